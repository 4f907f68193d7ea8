"""
Reverse chains: from noise to an action.

A sampler takes ``denoise_fn(x_t, t) -> x_0``, the current guess of the clean action, with ``t`` a python integer. It knows
nothing of networks, observations or devices, and its noise is an argument: the caller decides on randomness and on
gradients. Legend: B batch, A action dimension, T diffusion steps. Scaled actions lie in [-1, 1].
"""

import math
from collections.abc import Callable

import torch as th

from sb3_qsm.schedules import NoiseSchedule

DenoiseFn = Callable[[th.Tensor, int], th.Tensor]
Sampler = Callable[[DenoiseFn, NoiseSchedule, th.Tensor, th.Tensor], th.Tensor]


def ddpm_sample(
    denoise_fn: DenoiseFn, schedule: NoiseSchedule, x_T: th.Tensor, noise: th.Tensor, clip_range: float = 1.0
) -> th.Tensor:
    """
    Ancestral sampling (Ho et al., 2020, arXiv:2006.11239, Algorithm 2, with the posterior of Eq. 6-7).

    The guess of the clean action is clipped, never the running x_t: clipping x_t piles samples up on the bounds.

    :param denoise_fn: guess of the clean action, (x_t of shape (B, A), level t) -> (B, A)
    :param schedule: noise levels
    :param x_T: start of the chain, shape (B, A)
    :param noise: standard normal for each step, shape (T, B, A); zeros give the chain of posterior means
    :param clip_range: the guess is clipped to [-clip_range, clip_range]
    :return: actions, shape (B, A)
    """
    x_t, noises = x_T, noise.unbind()
    for t in range(schedule.n_steps - 1, 0, -1):
        x_0 = denoise_fn(x_t, t).clamp(-clip_range, clip_range)
        of_x_0, of_x_t, std = schedule.posterior[t]
        x_t = th.add(of_x_0 * x_0, x_t, alpha=of_x_t).add(noises[t], alpha=std)
    return denoise_fn(x_t, 0).clamp(-clip_range, clip_range)


def ddim_sample(
    denoise_fn: DenoiseFn, schedule: NoiseSchedule, x_T: th.Tensor, noise: th.Tensor, clip_range: float = 1.0
) -> th.Tensor:
    """
    Deterministic sampling (Song et al., 2021, arXiv:2010.02502, Eq. 12 with zero variance): all randomness is in ``x_T``.

    Arguments and result as for :func:`ddpm_sample`; ``noise`` is not used, it makes samplers interchangeable.
    """
    x_t = x_T
    for t in range(schedule.n_steps - 1, 0, -1):
        x_0 = denoise_fn(x_t, t).clamp(-clip_range, clip_range)
        _, alpha, sigma = schedule.levels[t]
        _, alpha_next, sigma_next = schedule.levels[t - 1]
        x_t = alpha_next * x_0 + (sigma_next / sigma) * (x_t - alpha * x_0)
    return denoise_fn(x_t, 0).clamp(-clip_range, clip_range)


def running_clip_sample(
    denoise_fn: DenoiseFn, schedule: NoiseSchedule, x_T: th.Tensor, noise: th.Tensor, clip_range: float = 1.0
) -> th.Tensor:
    """
    Ancestral sampling as in the QSM authors' code: variance beta_t, the running x_t is clipped, the guess of x_0 is not.

    Arguments and result as for :func:`ddpm_sample`; ``clip_range`` bounds x_t after each step.
    """
    x_t = x_T
    for t in reversed(range(schedule.n_steps)):
        beta, alpha, sigma = schedule.levels[t]
        predicted_noise = (x_t - alpha * denoise_fn(x_t, t)) / sigma
        x_t = (x_t - beta / sigma * predicted_noise) / math.sqrt(1 - beta)  # Ho et al., 2020, Eq. 11
        if t > 0:
            x_t = x_t + math.sqrt(beta) * noise[t]
        x_t = x_t.clamp(-clip_range, clip_range)
    return x_t


SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm_sample, "ddim": ddim_sample, "running_clip": running_clip_sample}
