"""
Q-score matching: the equations, as pure functions of tensors.

The target policy is pi(a | s) proportional to exp(Q(s, a) / lambda) on the box [-1, 1]^A, with temperature lambda
(``ent_coef``, the inverse of the paper's M_q). A target says which clean action a denoiser should answer for a noisy action
u = a_0 + r z, given g = dQ/da; by Tweedie's formula, score = (a_0 - u) / r^2 and noise z = (u - a_0) / r.

Legend: B batch, A action dimension. Scaled actions are in [-1, 1]; g and lambda are in one unit of value.
"""

import math
from collections.abc import Callable

import torch as th

QFn = Callable[[th.Tensor], th.Tensor]
ScoreTarget = Callable[..., tuple[th.Tensor, th.Tensor]]

# Levels with a larger ratio of noise to signal choose among good answers, the others refine the one chosen
CHOOSING_RATIO = 0.3


def action_gradient(q_fn: QFn, actions: th.Tensor) -> th.Tensor:
    """
    dQ/da at ``actions``; works under ``no_grad`` and leaves the gradients of the critic's parameters alone.

    :param q_fn: value of each action, (B, A) -> (B, 1)
    :param actions: where to take the gradient, shape (B, A)
    :return: gradient, shape (B, A), a constant for autograd
    """
    with th.enable_grad():
        actions = actions.detach().requires_grad_(True)
        return th.autograd.grad(q_fn(actions).sum(), actions)[0]


def published_target(noisy_actions: th.Tensor, ratio: th.Tensor, q_grad: th.Tensor, ent_coef: th.Tensor) -> th.Tensor:
    """
    The published target (Psenka et al., 2024, arXiv:2312.11752; sign as in the authors' code): noise z = -g / lambda.

    :param noisy_actions: u, shape (B, A)
    :param ratio: noise-to-signal ratio r, shape (B, 1)
    :param q_grad: dQ/da at the noisy action, shape (B, A)
    :param ent_coef: temperature lambda = 1 / M_q, shape ()
    :return: clean action that corresponds to the target noise, shape (B, A)
    """
    return noisy_actions + ratio * q_grad / ent_coef


def truncated_normal_mean(mean: th.Tensor, std: th.Tensor) -> th.Tensor:
    """
    Mean of N(mean, std^2) truncated to [-1, 1], stable when all of the normal's mass is outside.

    By symmetry the normal is put to the left of the box; the ratio of density to mass there is written with the scaled
    complementary error function, so that nothing under- or overflows into a wrong number.

    :param mean: location before truncation, any shape
    :param std: scale before truncation, broadcastable to ``mean``
    :return: means, in [-1, 1], shape of ``mean``
    """
    # Beyond 30 the density on the box is, to 1e-4, an exponential of slope mean / std^2, and differences lose their digits
    wide = std.clamp(max=30)
    mean, std = mean * (wide / std) ** 2, wide
    lower, upper = (mean.abs() - 1) / std, (mean.abs() + 1) / std
    decay = 2 * mean.abs() / std**2  # log of the ratio of the densities at the two bounds
    mass = th.special.erfcx(lower * math.sqrt(0.5)) - th.exp(-decay) * th.special.erfcx(upper * math.sqrt(0.5))
    shift = std * math.sqrt(2 / math.pi) * -th.expm1(-decay) / mass
    # Far outside, mean and shift cancel to rounding errors; there the density on the box is an exponential
    rate = lower / std
    far = 1 - 1 / rate + 2 / th.expm1(2 * rate)
    return mean.sign() * th.where(lower > 100, far, mean.abs() - shift).clamp(-1, 1)


def box_target(
    noisy_actions: th.Tensor, ratio: th.Tensor, q_grad: th.Tensor, ent_coef: th.Tensor, max_shift: float = 4.0
) -> th.Tensor:
    """
    Posterior mean of the clean action on the box, with Q to first order (derived in docs/algorithm.md).

    exp(g a_0 / lambda) N(a_0; u, r^2) is a normal moved by r^2 g / lambda, truncated to the box. As r -> 0 its noise is the
    published one times r; for flat Q it is the exact score of the noised uniform policy. A long shift makes a noisy target, so
    it is cut. Arguments as for :func:`published_target`, with the gradient at a clean action.

    :param max_shift: longest shift in each dimension, in units of r
    :return: clean actions, in [-1, 1], shape (B, A)
    """
    shift = (ratio * q_grad / ent_coef).clamp(-max_shift, max_shift)
    return truncated_normal_mean(noisy_actions + ratio * shift, ratio)


def box_score_target(
    q_fn: QFn, denoised: th.Tensor, variance: th.Tensor, noisy_actions: th.Tensor, ratio: th.Tensor, ent_coef: th.Tensor
) -> tuple[th.Tensor, th.Tensor]:
    """
    The default: :func:`box_target` with the gradient between the denoiser's present answer and the one that a flat Q has.

    With little noise it is taken at the answer, which converges to its own target: the tangent is where it is used, and within
    the cut exact for a quadratic Q too. With much noise the answer is a mean over all that is good; a gradient there would
    choose for it.

    :param q_fn: value of each action, (B, A) -> (B, 1)
    :param denoised: clean actions that the denoiser answers now, a constant for autograd, shape (B, A)
    :param variance: their variance as it answers it, of the same shape; not used here, it makes targets interchangeable
    :param noisy_actions: u, shape (B, A)
    :param ratio: noise-to-signal ratio r, shape (B, 1)
    :param ent_coef: temperature lambda, shape () or (B, 1)
    :return: clean actions to regress on, and the gradient of Q that led there, each of shape (B, A)
    """
    flat_q = truncated_normal_mean(noisy_actions, ratio)
    q_grad = action_gradient(q_fn, flat_q.lerp(denoised.clamp(-1, 1), 1 / (1 + ratio**2)))
    return box_target(noisy_actions, ratio, q_grad, ent_coef), q_grad


def drawn_target(
    q_fn: QFn,
    denoised: th.Tensor,
    variance: th.Tensor,
    noisy_actions: th.Tensor,
    ratio: th.Tensor,
    ent_coef: th.Tensor,
    n_draws: int = 4,
) -> th.Tensor:
    """
    Posterior mean of the clean action by drawing: what the denoiser takes the posterior for, a normal of its mean and variance
    on the box, weighed by exp(Q / lambda) N(a_0; u, r^2) over its own density (self-normalised importance sampling).

    Unlike a slope it sees how high Q is elsewhere. The better the denoiser, the more equal the weights, in any number of
    dimensions, so that few draws do; each dimension's are spread evenly over its quantiles.

    :param q_fn: value of each action, (B, A) -> (B, 1)
    :param denoised: clean actions that the denoiser answers now, shape (B, A)
    :param variance: their variance, shape (B, A)
    :param noisy_actions: u, shape (B, A)
    :param ratio: noise-to-signal ratio r, shape (B, 1)
    :param ent_coef: temperature lambda, shape () or (B, 1)
    :param n_draws: number of draws K, each of which costs one pass of the critics
    :return: clean actions to regress on, in [-1, 1], shape (B, A)
    """
    with th.no_grad():
        mean, std = denoised.clamp(-1, 1), variance.clamp(min=1e-6).sqrt()
        lower, upper = th.special.ndtr((-1 - mean) / std), th.special.ndtr((1 - mean) / std)
        order, within = th.rand(2, n_draws, *mean.shape, device=mean.device)
        quantiles = (order.argsort(dim=0) + within) / n_draws
        draws = (mean + std * th.special.ndtri(lower.lerp(upper, quantiles))).clamp(-1, 1)
        values = th.stack([q_fn(draw) for draw in draws]) / ent_coef
        log_ratios = 0.5 * (((draws - mean) / std) ** 2 - ((draws - noisy_actions) / ratio) ** 2).sum(dim=2, keepdim=True)
        return ((values + log_ratios).softmax(dim=0) * draws).sum(dim=0)


def heights_score_target(
    q_fn: QFn, denoised: th.Tensor, variance: th.Tensor, noisy_actions: th.Tensor, ratio: th.Tensor, ent_coef: th.Tensor
) -> tuple[th.Tensor, th.Tensor]:
    """
    Levels that choose among good answers see how high these are, by :func:`drawn_target`; those that refine the one chosen
    follow slopes, as :func:`box_score_target`.

    Arguments and result as for that; the variance has to be learnt.
    """
    of_slopes, q_grad = box_score_target(q_fn, denoised, variance, noisy_actions, ratio, ent_coef)
    of_heights = drawn_target(q_fn, denoised, variance, noisy_actions, ratio, ent_coef)
    return th.where(ratio > CHOOSING_RATIO, of_heights, of_slopes), q_grad


def published_score_target(
    q_fn: QFn, denoised: th.Tensor, variance: th.Tensor, noisy_actions: th.Tensor, ratio: th.Tensor, ent_coef: th.Tensor
) -> tuple[th.Tensor, th.Tensor]:
    """
    The published method: :func:`published_target` with the gradient at the noisy action of the variance-preserving chain,
    a_t = u / sqrt(1 + r^2), as in the authors' code.

    Arguments and result as for :func:`box_score_target`.
    """
    q_grad = action_gradient(q_fn, noisy_actions / (1 + ratio**2).sqrt())
    return published_target(noisy_actions, ratio, q_grad, ent_coef), q_grad


SCORE_TARGETS: dict[str, ScoreTarget] = {
    "box": box_score_target,
    "heights": heights_score_target,
    "published": published_score_target,
}


def posterior_variance(denoised: th.Tensor, noisy_actions: th.Tensor, ratio: th.Tensor) -> th.Tensor:
    """
    Variance of the clean action given the noisy one, which its mean implies: Var[a_0 | u] = r^2 d E[a_0 | u] / du (Manor and
    Michaeli, 2024, arXiv:2309.13598, Theorem 1), and at most 1 - E[a_0 | u]^2, as of anything within [-1, 1].

    Each dimension's derivative is estimated with one random sign for each dimension, which is right on average.

    :param denoised: mean of the clean action as computed from ``noisy_actions``, whose graph is kept, shape (B, A)
    :param noisy_actions: u, shape (B, A)
    :param ratio: noise-to-signal ratio r, shape (B, 1)
    :return: variance, a constant for autograd, shape (B, A)
    """
    signs = th.randint_like(denoised, 2) * 2 - 1
    (slopes,) = th.autograd.grad(denoised, noisy_actions, signs, retain_graph=True)
    return (ratio**2 * signs * slopes).minimum(1 - denoised.detach().clamp(-1, 1) ** 2)


def score_matching_loss(prediction: th.Tensor, target: th.Tensor, scale: th.Tensor) -> th.Tensor:
    """
    Squared error of the predicted clean action in units of ``scale``.

    With scale = r this is the squared error of the predicted noise.

    :param prediction: denoised actions, shape (B, A)
    :param target: actions to regress on, shape (B, A)
    :param scale: unit of the error for each sample, shape (B, 1)
    :return: mean over the batch and the action dimensions, shape ()
    :raises ValueError: if ``prediction`` and ``target`` differ in shape (they would broadcast silently)
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction and target must have one shape, got {tuple(prediction.shape)} and {tuple(target.shape)}")
    return (((prediction - target) / scale) ** 2).mean()


def box_entropy(slope: th.Tensor) -> th.Tensor:
    """
    Differential entropy of the density proportional to exp(slope * a) on [-1, 1].

    :param slope: |dQ/da| / lambda, any shape
    :return: entropy in nats, log(2) for a flat Q, falling like 1 - log(slope) for a steep one; shape of ``slope``
    """
    slope = slope.abs().clamp(min=1e-4)
    mass = -th.expm1(-2 * slope)
    return th.log(mass / slope) + 1 - 2 * slope * th.exp(-2 * slope) / mass


def boltzmann_mean(q_values: th.Tensor, ent_coef: th.Tensor) -> th.Tensor:
    """
    Value of choosing among K drawn actions by exp(Q / lambda), between their mean and their largest.

    A policy that has given up a way draws it rarely; this value says what the way is worth to one that knows both.

    :param q_values: values of the draws, shape (K, B, 1)
    :param ent_coef: temperature lambda, shape ()
    :return: shape (B, 1)
    """
    return ((q_values / ent_coef).softmax(dim=0) * q_values).sum(dim=0)


def undecided_ent_coef(
    ent_coef: th.Tensor, ratio: th.Tensor, td_error: th.Tensor, n_errors: float = 3.0, min_ratio: float = CHOOSING_RATIO
) -> th.Tensor:
    """
    Temperature of each noise level, so that a chain does not choose by differences of Q that are within the critics' error.

    Levels of much noise choose between good answers, those of little noise refine the one chosen.

    :param ent_coef: temperature lambda, shape ()
    :param ratio: noise-to-signal ratio r, shape (B, 1)
    :param td_error: root mean square error of a critic, in units of ``ent_coef``, shape ()
    :param n_errors: lowest temperature of the noisy levels, in units of ``td_error``
    :param min_ratio: least ratio of a noisy level
    :return: temperatures, shape (B, 1)
    """
    return th.where(ratio > min_ratio, ent_coef.maximum(n_errors * td_error), ent_coef)
