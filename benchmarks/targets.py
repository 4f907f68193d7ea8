"""The default's score target with one of its choices changed, for the suite ``ablation``."""

import torch as th

from sb3_qsm.losses import QFn, action_gradient, box_target


def at_noisy(
    q_fn: QFn, denoised: th.Tensor, variance: th.Tensor, noisy_actions: th.Tensor, ratio: th.Tensor, ent_coef: th.Tensor
) -> tuple[th.Tensor, th.Tensor]:
    """
    The gradient as published: at the noisy action of the variance-preserving form, here in the box.

    Arguments and result as for :func:`~sb3_qsm.losses.box_score_target`.
    """
    q_grad = action_gradient(q_fn, (noisy_actions / (1 + ratio**2).sqrt()).clamp(-1, 1))
    return box_target(noisy_actions, ratio, q_grad, ent_coef), q_grad
