"""The default's score target with one of its choices changed, for the suite ``ablation``."""

import math
from collections.abc import Callable
from functools import partial

import torch as th

from sb3_qsm.losses import QFn, ScoreTarget, action_gradient, box_target, truncated_normal_mean

Point = Callable[[th.Tensor, th.Tensor, th.Tensor, th.Tensor], th.Tensor]


def score_at(point: Point, target_fn: Callable[..., th.Tensor] = box_target) -> ScoreTarget:
    """
    :param point: where to take the gradient of Q, from the answer of a flat Q, the denoiser's answer, a_t and alpha
    :param target_fn: the target at that gradient, a function like :func:`~sb3_qsm.losses.box_target`
    :return: a function like :func:`~sb3_qsm.losses.box_score`
    """

    def score(
        q_fn: QFn, denoised: th.Tensor, noisy_actions: th.Tensor, alpha: th.Tensor, sigma: th.Tensor, ent_coef: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        flat_q = truncated_normal_mean(noisy_actions / alpha, sigma / alpha)
        q_grad = action_gradient(q_fn, point(flat_q, denoised.clamp(-1, 1), noisy_actions, alpha))
        return target_fn(noisy_actions, alpha, sigma, q_grad, ent_coef), q_grad

    return score


at_answer = score_at(lambda flat_q, answer, noisy_actions, alpha: answer)
at_flat = score_at(lambda flat_q, answer, noisy_actions, alpha: flat_q)
at_noisy = score_at(lambda flat_q, answer, noisy_actions, alpha: noisy_actions.clamp(-1, 1))  # as published, in the box
no_clip = score_at(
    lambda flat_q, answer, noisy_actions, alpha: flat_q.lerp(answer, alpha**2), partial(box_target, max_shift=math.inf)
)
