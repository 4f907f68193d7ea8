"""The default's score target with one of its choices changed, for the suite ``ablation``."""

import math
from collections.abc import Callable
from functools import partial

import torch as th

from sb3_qsm.losses import QFn, ScoreTarget, action_gradient, box_target, truncated_normal_mean

Point = Callable[[th.Tensor, th.Tensor, th.Tensor, th.Tensor], th.Tensor]


def score_at(point: Point, target_fn: Callable[..., th.Tensor] = box_target) -> ScoreTarget:
    """
    :param point: where to take the gradient of Q, from the answer of a flat Q, the denoiser's answer, the noisy actions and
        the weight alpha^2 = 1 / (1 + r^2) of the signal in them
    :param target_fn: the target at that gradient, a function like :func:`~sb3_qsm.losses.box_target`
    :return: a function like :func:`~sb3_qsm.losses.box_score_target`
    """

    def score(
        q_fn: QFn, denoised: th.Tensor, noisy_actions: th.Tensor, ratio: th.Tensor, ent_coef: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        flat_q = truncated_normal_mean(noisy_actions, ratio)
        q_grad = action_gradient(q_fn, point(flat_q, denoised.clamp(-1, 1), noisy_actions, 1 / (1 + ratio**2)))
        return target_fn(noisy_actions, ratio, q_grad, ent_coef), q_grad

    return score


at_answer = score_at(lambda flat_q, answer, noisy, signal: answer)
at_flat = score_at(lambda flat_q, answer, noisy, signal: flat_q)
# As published, in the box: at alpha u, the noisy action of the variance-preserving form
at_noisy = score_at(lambda flat_q, answer, noisy, signal: (signal.sqrt() * noisy).clamp(-1, 1))
no_clip = score_at(lambda flat_q, answer, noisy, signal: flat_q.lerp(answer, signal), partial(box_target, max_shift=math.inf))
