"""
Q-score matching as published: the configuration and the parts that only the paper's method needs.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs
from torch import nn

from sb3_qsm.policies import DiffusionPolicy
from sb3_qsm.qsm import QSM
from sb3_qsm.samplers import DenoiseFn


def running_clip_sample(
    denoise_fn: DenoiseFn, ratios: Sequence[float], start: th.Tensor, noise: Sequence[th.Tensor], clip_range: float = 1.0
) -> th.Tensor:
    """
    Ancestral sampling as in the QSM authors' code: the mean of Ho et al. (2020, arXiv:2006.11239, Eq. 11) with variance
    beta_t; the running variance-preserving action a_t = u / sqrt(1 + r_t^2) is clipped, the guess of a_0 is not.

    Arguments and result as for :func:`~sb3_qsm.samplers.ddpm_sample`; ``clip_range`` bounds a_t after each step.
    """
    u = start
    for t in reversed(range(len(ratios))):
        ratio, next_ratio = ratios[t], ratios[t - 1] if t > 0 else 0.0
        u = denoise_fn(u, t)[0].lerp(u, (next_ratio / ratio) ** 2)
        next_alpha = 1 / math.sqrt(1 + next_ratio**2)
        if t > 0:
            beta = (ratio**2 - next_ratio**2) / (1 + ratio**2)
            u = u.add(noise[t], alpha=math.sqrt(beta) / next_alpha)
        u = u.clamp(-clip_range / next_alpha, clip_range / next_alpha)
    return u


PUBLISHED: dict[str, Any] = dict(
    learning_rate=3e-4,
    learning_starts=10_000,
    tau=0.005,
    n_steps=1,
    ent_coef=1 / 50,
    policy_delay=1,
    pessimism=1.0,
    ema_decay=0.0,
    normalize_reward=False,
    score_target="published",
)
PUBLISHED_POLICY: dict[str, Any] = dict(
    net_arch=[512, 512],
    embedding_dim=None,
    activation_fn=nn.ReLU,
    n_diffusion_steps=5,
    noise_schedule="vp",
    sampler=running_clip_sample,
    preconditioning="noise",
    denoiser_class="mlp",
    denoiser_kwargs=dict(activation_fn=nn.Mish),
)


class PublishedQSM(QSM):
    """
    The configuration of Psenka et al. (2024, arXiv:2312.11752) and their code, the same for every task but ``ent_coef``:
    1 / M_q with M_q = 50, and 120 for quadruped and humanoid of dm_control. Beside: noise N(0, 0.1^2) on the behaviour
    action and on the next action in the critics' target; the actor's learning rate falls along a cosine over 2e6 updates.

    :param policy: as for :class:`~sb3_qsm.qsm.QSM`
    :param env: as for QSM
    :param policy_kwargs: replaces single entries of the paper's
    :param kwargs: arguments of QSM, in place of the paper's
    """

    noise_std, actor_lr_decay_updates = 0.1, 2_000_000

    def __init__(
        self,
        policy: str | type[DiffusionPolicy],
        env: GymEnv | str,
        policy_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, env, policy_kwargs=PUBLISHED_POLICY | (policy_kwargs or {}), **(PUBLISHED | kwargs))

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.action_noise is None:
            self.action_noise = NormalActionNoise(
                np.zeros(self.actor.action_dim), np.full(self.actor.action_dim, self.noise_std)
            )

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        super()._update_learning_rate(optimizers)
        for group in self.actor.optimizer.param_groups:
            group["lr"] *= 0.5 * (1 + math.cos(math.pi * min(1, self._n_updates / self.actor_lr_decay_updates)))

    def _next_actions(self, next_observations: PyTorchObs) -> th.Tensor:
        actions = super()._next_actions(next_observations)
        return (actions + self.noise_std * th.randn_like(actions)).clamp(-1, 1)
