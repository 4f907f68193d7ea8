"""
The unit of values: rewards are divided by their size, so that learning does not depend on their scale.
"""

import torch as th
from torch import nn


class RewardScale(nn.Module):
    """
    Root mean square of the rewards that are learnt from, a running mean over batches; 1 until a reward is not 0.

    It is measured on sampled batches, not on the environment: what a buffer was filled with, or makes of its rewards when it
    is sampled, counts like what was just seen.

    :param rate: share of a new batch, larger at first; 0 keeps the scale at 1
    """

    rms: th.Tensor
    n_batches: th.Tensor

    def __init__(self, rate: float = 1e-2) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("rms", th.zeros(()))
        self.register_buffer("n_batches", th.zeros(()))

    def value(self) -> th.Tensor:
        """
        :return: the scale, shape ()
        """
        return th.where(self.rms > 0, self.rms, 1.0)

    @th.no_grad()
    def update(self, rewards: th.Tensor) -> None:
        """
        :param rewards: rewards per step of a batch, shape (B, 1)
        """
        if self.rate == 0:
            return
        largest = rewards.abs().max()  # squares of large rewards would overflow
        batch = largest * (rewards / largest.clamp(min=1e-30)).square().mean().sqrt()
        share = (1 / (1 + self.n_batches)).clamp(min=self.rate)
        new = th.hypot((1 - share).sqrt() * self.rms, share.sqrt() * batch)
        self.rms.copy_(th.where(new.isfinite(), new, self.rms))  # broken rewards stop the run at the critics' loss
        self.n_batches += 1
