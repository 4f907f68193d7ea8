"""
Temperature lambda of the policy exp(Q / lambda): fixed, or adapted to an entropy target.
"""

import math
from typing import Any

import torch as th
from torch import nn


class Temperature(nn.Module):
    """
    Base class: override ``update``.

    :param ent_coef: the temperature to begin with, positive
    """

    def __init__(self, ent_coef: float) -> None:
        super().__init__()
        self.log_ent_coef = nn.Parameter(th.tensor(math.log(ent_coef)), requires_grad=False)

    def value(self) -> th.Tensor:
        """
        :return: the temperature, shape ()
        """
        return self.log_ent_coef.detach().exp()

    def update(self, entropy: th.Tensor) -> th.Tensor:
        """
        :param entropy: estimate of the policy's entropy in nats, shape ()
        :return: loss of the temperature, as SAC logs it, shape ()
        """
        raise NotImplementedError


class FixedTemperature(Temperature):
    """
    A constant temperature.

    :param ent_coef: the temperature, positive
    """

    def update(self, entropy: th.Tensor) -> th.Tensor:
        return th.zeros_like(entropy)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """
        Nothing is loaded: the number is an argument of the algorithm, which ``load`` may be given anew.
        """


class AutoTemperature(Temperature):
    """
    A temperature that falls while the entropy is above its target and rises while it is below.

    For a steep Q the entropy changes by one nat per dimension when log lambda changes by one, so that the whole gap divided by
    the number of dimensions would be Newton's step. A share of it averages over batches, and holds the entropy while Q grows:
    however large the rewards, lambda is never far behind.

    :param ent_coef: initial temperature, positive
    :param target_entropy: wanted entropy of the policy in nats
    :param action_dim: number of action dimensions A
    :param rate: share of Newton's step
    """

    def __init__(self, ent_coef: float, target_entropy: float, action_dim: int, rate: float = 0.05) -> None:
        super().__init__(ent_coef)
        self.target_entropy = target_entropy
        self.step = rate / action_dim

    def update(self, entropy: th.Tensor) -> th.Tensor:
        gap = (entropy - self.target_entropy).detach()
        loss = self.log_ent_coef * gap
        self.log_ent_coef.sub_(self.step * gap)
        return loss


def make_temperature(ent_coef: str | float, target_entropy: str | float, action_dim: int) -> Temperature:
    """
    The temperature that goes with SAC's two arguments.

    :param ent_coef: a positive number, "auto", or "auto_0.1" for another start than 1
    :param target_entropy: a number in nats, or "auto" for minus half the action dimension
    :param action_dim: number of action dimensions A
    :return: temperature
    :raises ValueError: for anything else
    """
    automatic = isinstance(ent_coef, str) and (ent_coef == "auto" or ent_coef.startswith("auto_"))
    start = _number(str(ent_coef).removeprefix("auto").removeprefix("_") or 1.0 if automatic else ent_coef)
    if not 0 < start < math.inf:
        raise ValueError(f'ent_coef must be a positive number, "auto" or "auto_<positive number>", got {ent_coef!r}')
    wanted = _number(-action_dim / 2 if target_entropy == "auto" else target_entropy)
    if not math.isfinite(wanted):
        raise ValueError(f'target_entropy must be a number or "auto", got {target_entropy!r}')
    return AutoTemperature(start, wanted, action_dim) if automatic else FixedTemperature(start)


def _number(value: str | float) -> float:
    """The number that ``value`` stands for, NaN if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
