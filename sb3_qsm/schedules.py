"""
Noise levels of the diffusion: how much of an action is left, and how much noise is on it, at each step.

Legend: B batch, A action dimension, T diffusion steps. Level t runs from 0 (least noise) to T - 1 (most noise).
Forward process (Ho et al., 2020, arXiv:2006.11239, Eq. 4): a_t = alpha_t a_0 + sigma_t z with z ~ N(0, I),
alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t), abar_t = prod_{s <= t} (1 - beta_s).
"""

import math
from collections.abc import Callable

import torch as th
from torch import nn


def vp_betas(n_steps: int, beta_min: float = 0.1, beta_max: float = 10.0) -> th.Tensor:
    """
    Variance-preserving SDE, discretised (Song et al., 2021, arXiv:2011.13456); the schedule of the QSM authors.

    :param n_steps: number of diffusion steps T
    :param beta_min: noise rate at the clean end
    :param beta_max: noise rate at the noisy end
    :return: betas, shape (T,)
    """
    t = th.arange(1, n_steps + 1, dtype=th.float64)
    return 1 - th.exp(-beta_min / n_steps - 0.5 * (beta_max - beta_min) * (2 * t - 1) / n_steps**2)


def cosine_betas(n_steps: int, offset: float = 0.008, beta_max: float = 0.999) -> th.Tensor:
    """
    Squared-cosine decay of abar (Nichol and Dhariwal, 2021, arXiv:2102.09672, Eq. 17).

    :param n_steps: number of diffusion steps T
    :param offset: keeps the first beta from vanishing
    :param beta_max: upper limit of each beta
    :return: betas, shape (T,)
    """
    u = th.linspace(0, 1, n_steps + 1, dtype=th.float64)
    alphas_cumprod = th.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=beta_max)


def linear_betas(n_steps: int, beta_min: float = 1e-4, beta_max: float = 2e-2) -> th.Tensor:
    """
    Evenly spaced betas (Ho et al., 2020, section 4), rescaled by 1000 / T so that short chains still end in noise.

    :param n_steps: number of diffusion steps T
    :param beta_min: first beta of a chain of 1000 steps
    :param beta_max: last beta of a chain of 1000 steps
    :return: betas, shape (T,)
    """
    scale = 1000 / n_steps
    return th.linspace(scale * beta_min, scale * beta_max, n_steps, dtype=th.float64).clamp(max=0.999)


def box_betas(n_steps: int, ratio_min: float = 0.1, ratio_max: float = 2.5) -> th.Tensor:
    """
    Geometric noise-to-signal ratios r_t = sigma_t / alpha_t, made for actions in [-1, 1].

    The box is 2 wide, so a ratio beyond 3 carries no information about the action and one far below the spread of the
    policy changes nothing: every step is spent in between.

    :param n_steps: number of diffusion steps T
    :param ratio_min: noise-to-signal ratio of the first level, in half-widths of the box
    :param ratio_max: noise-to-signal ratio of the last level
    :return: betas, shape (T,)
    """
    first = ratio_min if n_steps > 1 else ratio_max  # a single step has to come from noise
    ratios = th.logspace(math.log10(first), math.log10(ratio_max), n_steps, dtype=th.float64)
    alphas_cumprod = 1 / (1 + ratios**2)
    previous = th.cat([th.ones(1, dtype=th.float64), alphas_cumprod[:-1]])
    return 1 - alphas_cumprod / previous


BETA_SCHEDULES: dict[str, Callable[[int], th.Tensor]] = {
    "box": box_betas,
    "cosine": cosine_betas,
    "linear": linear_betas,
    "vp": vp_betas,
}


class NoiseSchedule(nn.Module):
    """
    The noise levels of a chain, derived from its betas.

    The tensors are buffers that follow ``.to(device)`` but are not saved: a state dict holds learned numbers only.

    :param betas: variance added at each step, shape (T,), each in (0, 1)
    :raises ValueError: if ``betas`` is empty, not one-dimensional, or leaves (0, 1)
    """

    betas: th.Tensor
    alpha: th.Tensor
    sigma: th.Tensor

    def __init__(self, betas: th.Tensor) -> None:
        super().__init__()
        if betas.ndim != 1 or len(betas) == 0 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(f"betas must be a non-empty vector of numbers in (0, 1), got {betas.tolist()}")
        betas = betas.double().cpu()  # float64 while deriving: 1 - abar loses digits at the clean end
        alphas_cumprod = th.cumprod(1 - betas, dim=0)
        self.register_buffer("betas", betas.float(), persistent=False)
        self.register_buffer("alpha", alphas_cumprod.sqrt().float(), persistent=False)
        self.register_buffer("sigma", (1 - alphas_cumprod).sqrt().float(), persistent=False)
        # The same numbers as python floats: a chain on small tensors spends its time in dispatch, not in arithmetic
        self.levels = list(zip(betas.tolist(), self.alpha.tolist(), self.sigma.tolist(), strict=True))
        # Mean and spread of a_{t-1} given a_t and a_0 (Ho et al., 2020, Eq. 7): shares of a_0 and a_t, standard deviation
        previous = th.cat([th.ones(1, dtype=th.float64), alphas_cumprod[:-1]])
        left = (1 - previous) / (1 - alphas_cumprod)  # share of the noise's variance
        of_a_0, of_a_t, std = previous.sqrt() * betas / (1 - alphas_cumprod), (1 - betas).sqrt() * left, (left * betas).sqrt()
        # A tensor costs half of what a python float does as a factor; as the alpha of an addition it has to be a float
        self.posterior = list(zip(of_a_0.float().unbind(), of_a_t.tolist(), std.tolist(), strict=True))

    @property
    def n_steps(self) -> int:
        """Number of diffusion steps T."""
        return len(self.levels)

    def add_noise(self, actions: th.Tensor, noise: th.Tensor, t: th.Tensor) -> th.Tensor:
        """
        Forward process (Ho et al., 2020, Eq. 4): a_t = alpha_t a_0 + sigma_t z.

        :param actions: clean scaled actions, shape (B, A)
        :param noise: standard normal, shape (B, A)
        :param t: levels, integers in [0, T), shape (B,)
        :return: noisy actions, shape (B, A)
        """
        return self.alpha[t, None] * actions + self.sigma[t, None] * noise
