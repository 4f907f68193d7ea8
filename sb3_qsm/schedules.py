"""
Noise levels of the diffusion: the noise-to-signal ratio r of each step, which is all that a chain knows of its noise.

Legend: T diffusion steps. Level t runs from 0 (least noise) to T - 1 (most noise). Forward process, in the variables of
Karras et al. (2022, arXiv:2206.00364): u = a_0 + r_t z with z ~ N(0, I). The variance-preserving form of Ho et al. (2020,
arXiv:2006.11239, Eq. 4) is a_t = alpha_t u with alpha_t = 1 / sqrt(1 + r_t^2), where alpha_t^2 = prod_{s <= t} (1 - beta_s).
"""

import math
from collections.abc import Callable

import torch as th

Schedule = Callable[[int], th.Tensor]


def geometric_ratios(n_steps: int, ratio_min: float = 0.1, ratio_max: float = 2.5) -> th.Tensor:
    """
    Evenly spaced in the logarithm, made for actions in [-1, 1].

    The box is 2 wide, so a ratio beyond 3 carries no information about the action and one far below the spread of the
    policy changes nothing: every step is spent in between.

    :param n_steps: number of diffusion steps T
    :param ratio_min: ratio of the first level, in half-widths of the box
    :param ratio_max: ratio of the last level
    :return: ratios, shape (T,)
    """
    first = ratio_min if n_steps > 1 else ratio_max  # a single step has to come from noise
    return th.logspace(math.log10(first), math.log10(ratio_max), n_steps, dtype=th.float64)


def vp_ratios(n_steps: int, beta_min: float = 0.1, beta_max: float = 10.0) -> th.Tensor:
    """
    Variance-preserving SDE, discretised (Song et al., 2021, arXiv:2011.13456); the schedule of the QSM authors.

    :param n_steps: number of diffusion steps T
    :param beta_min: noise rate at the clean end
    :param beta_max: noise rate at the noisy end
    :return: ratios, shape (T,)
    """
    t = th.arange(1, n_steps + 1, dtype=th.float64)
    return ratios_of_betas(1 - th.exp(-beta_min / n_steps - 0.5 * (beta_max - beta_min) * (2 * t - 1) / n_steps**2))


def cosine_ratios(n_steps: int, offset: float = 0.008, beta_max: float = 0.999) -> th.Tensor:
    """
    Squared-cosine decay of alpha^2 (Nichol and Dhariwal, 2021, arXiv:2102.09672, Eq. 17).

    :param n_steps: number of diffusion steps T
    :param offset: keeps the first beta from vanishing
    :param beta_max: upper limit of each beta
    :return: ratios, shape (T,)
    """
    u = th.linspace(0, 1, n_steps + 1, dtype=th.float64)
    alphas_cumprod = th.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
    return ratios_of_betas((1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=beta_max))


def linear_ratios(n_steps: int, beta_min: float = 1e-4, beta_max: float = 2e-2) -> th.Tensor:
    """
    Evenly spaced betas (Ho et al., 2020, section 4), rescaled by 1000 / T so that short chains still end in noise.

    :param n_steps: number of diffusion steps T
    :param beta_min: first beta of a chain of 1000 steps
    :param beta_max: last beta of a chain of 1000 steps
    :return: ratios, shape (T,)
    """
    scale = 1000 / n_steps
    return ratios_of_betas(th.linspace(scale * beta_min, scale * beta_max, n_steps, dtype=th.float64).clamp(max=0.999))


def ratios_of_betas(betas: th.Tensor) -> th.Tensor:
    """
    :param betas: variance added at each step of a variance-preserving chain, each in (0, 1), shape (T,)
    :return: ratios, shape (T,)
    """
    alphas_cumprod = th.cumprod(1 - betas, dim=0)
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()


SCHEDULES: dict[str, Schedule] = {
    "geometric": geometric_ratios,
    "cosine": cosine_ratios,
    "linear": linear_ratios,
    "vp": vp_ratios,
}
