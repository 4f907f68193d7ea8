"""
Reverse chains: from noise to an action.

A sampler takes ``denoise_fn(u, t)``, mean and variance of the clean action in u = a_0 + r_t z, with ``t`` a python integer,
and the ratios r as python floats, which cost a chain of small tensors nothing. It knows nothing of networks, observations or
devices, and its noise is an argument: the caller decides on randomness and on gradients.

Legend: B batch, A action dimension, T diffusion steps. Scaled actions lie in [-1, 1].
"""

from collections.abc import Callable, Sequence

import torch as th

DenoiseFn = Callable[[th.Tensor, int], tuple[th.Tensor, th.Tensor | float]]
Sampler = Callable[[DenoiseFn, Sequence[float], th.Tensor, Sequence[th.Tensor]], th.Tensor]


def ddpm_sample(
    denoise_fn: DenoiseFn, ratios: Sequence[float], start: th.Tensor, noise: Sequence[th.Tensor], clip_range: float = 1.0
) -> th.Tensor:
    """
    Ancestral sampling (Ho et al., 2020, arXiv:2006.11239, Algorithm 2, with the posterior of Eq. 6-7) for a clean action of
    which mean and variance are known: both moments of the next u are right, and those of the last step's action.

    The mean is clipped, never the running u: clipping u piles samples up on the bounds.

    :param denoise_fn: (u of shape (B, A), level t) -> mean of the clean action, shape (B, A), and its variance, of the same
        shape, or 0.0 to take the mean for certain
    :param ratios: noise-to-signal ratio of each level, rising, length T
    :param start: u at the last level, standard deviation sqrt(1 + r_T^2), shape (B, A)
    :param noise: standard normal for each step, T tensors of shape (B, A); zeros give the chain of posterior means
    :param clip_range: the mean and the action are clipped to [-clip_range, clip_range]
    :return: actions, shape (B, A)
    """
    u = start
    for t in reversed(range(len(ratios))):
        mean, variance = denoise_fn(u, t)
        next_ratio = ratios[t - 1] if t > 0 else 0.0
        kept = (next_ratio / ratios[t]) ** 2  # share of the noise's variance that is left
        std = (variance * (1 - kept) ** 2 + next_ratio**2 * (1 - kept)) ** 0.5
        u = mean.clamp(-clip_range, clip_range).lerp(u, kept)
        u = u.addcmul_(noise[t], std) if isinstance(std, th.Tensor) else u.add_(noise[t], alpha=std)  # a number costs less
    return u.clamp(-clip_range, clip_range)


def ddim_sample(
    denoise_fn: DenoiseFn, ratios: Sequence[float], start: th.Tensor, noise: Sequence[th.Tensor], clip_range: float = 1.0
) -> th.Tensor:
    """
    Deterministic sampling (Song et al., 2021, arXiv:2010.02502, Eq. 12 with zero variance): all randomness is in ``start``.

    Arguments and result as for :func:`ddpm_sample`; ``noise`` and variances are not used, they make samplers interchangeable.
    """
    u = start
    for t in range(len(ratios) - 1, 0, -1):
        mean, _ = denoise_fn(u, t)
        u = mean.clamp(-clip_range, clip_range).lerp(u, ratios[t - 1] / ratios[t])
    return denoise_fn(u, 0)[0].clamp(-clip_range, clip_range)


SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm_sample, "ddim": ddim_sample}
