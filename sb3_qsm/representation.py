"""
What critics and actor see of observations: a learnt representation, in which the next observation can be foretold.

Embeddings of states and of state-action pairs that predict each other (SALE: Fujimoto et al., 2023, arXiv:2306.02451), and the
reward and the end of the episode from the pair, so that what matters for the return is kept (MR.Q: Fujimoto et al., 2025,
arXiv:2501.16142). Simpler than both: the critics and the actor look through a slow copy, which is also what the embeddings
predict.

Legend: B batch, A action dimension, F features of an observation, Z units of an embedding.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, ReplayBufferSamples
from torch import nn
from torch.nn import functional as F

from sb3_qsm.networks import mlp


class RunningNorm(nn.Module):
    """
    Subtract the mean and divide by the spread of what has been learnt from: running means over batches.

    What hardly moves stays small: Ant's contact forces, brought to unit variance, would be half of what the networks see.

    :param size: number of features F
    :param rate: share of a new batch, larger at first; the start, mean 0 and variance 1, counts like ten batches, so that a
        policy that was given its weights keeps its behaviour
    :param floor: standard deviation that is added, in quadrature, to each feature's
    :param clip_range: largest size of the result
    """

    mean: th.Tensor
    variance: th.Tensor
    n_batches: th.Tensor

    def __init__(self, size: int, rate: float = 1e-2, floor: float = 0.5, clip_range: float = 5.0) -> None:
        super().__init__()
        self.rate = rate
        self.floor = floor
        self.clip_range = clip_range
        self.register_buffer("mean", th.zeros(size))
        self.register_buffer("variance", th.ones(size))
        self.register_buffer("n_batches", th.zeros(()))

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: features, shape (B, F)
        :return: normalised features, shape (B, F)
        """
        normalized = (x - self.mean) * (self.variance + self.floor**2).rsqrt()
        # An infinite observation is not to be taken for a large one
        return normalized.nan_to_num(math.nan, math.nan, math.nan).clamp(-self.clip_range, self.clip_range)

    @th.no_grad()
    def update(self, x: th.Tensor) -> None:
        """
        :param x: features of a batch, shape (B, F)
        """
        self.n_batches += 1
        share = (1 / (10 + self.n_batches)).clamp(min=self.rate)
        mean, variance = x.mean(dim=0), x.var(dim=0, correction=0)
        self.variance.lerp_(variance + (1 - share) * (mean - self.mean) ** 2, share)
        self.mean.lerp_(mean, share)


class Representation(BaseModel):
    """
    Embeddings z_s = f(s) of observations and z_sa = g(z_s, a) of pairs with an action.

    Features that are fixed functions of an observation (vectors) are normalised; where the features extractor learns (images),
    the representation learns one of its own.

    :param observation_space: Observation space
    :param action_space: Action space
    :param features_extractor: Network to extract features
    :param features_dim: Number of features F
    :param normalize_images: Whether to divide images by 255.0
    :param embedding_dim: Units Z of each layer and of both embeddings
    :param activation_fn: Activation function
    """

    features_extractor: BaseFeaturesExtractor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        normalize_images: bool = True,
        embedding_dim: int = 128,
        activation_fn: type[nn.Module] = nn.Hardswish,
    ) -> None:
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.embedding_dim = embedding_dim
        self._known: dict[int, th.Tensor] = {}
        self.learns_features = any(True for _ in features_extractor.parameters())
        self.norm = nn.Identity() if self.learns_features else RunningNorm(features_dim)
        sizes = [embedding_dim] * 3
        self.state_net = nn.Sequential(*mlp([features_dim, *sizes], activation_fn))
        self.pair_net = nn.Sequential(*mlp([embedding_dim + get_action_dim(action_space), *sizes], activation_fn))
        self.reward_and_end = nn.Linear(embedding_dim, 2)

    def state(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: observations
        :return: embeddings z_s of zero mean and unit variance over their units, shape (B, Z)
        """
        return self._embed(self.norm(self.extract_features(obs, self.features_extractor)))

    def _embed(self, features: th.Tensor) -> th.Tensor:
        return F.layer_norm(self.state_net(features), (self.embedding_dim,))

    def pair(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param states: embeddings z_s, shape (B, Z)
        :param actions: scaled actions, shape (B, A)
        :return: embeddings z_sa, shape (B, Z)
        """
        return self.pair_net(th.cat([states, actions], dim=1))

    def forward(self, obs: PyTorchObs, features: th.Tensor) -> th.Tensor:
        """
        :param obs: observations
        :param features: what the features extractor of an actor or a critic makes of them, shape (B, F)
        :return: normalised features and z_s, shape (B, F + Z)
        """
        if self.learns_features:
            return th.cat([features, self.state(obs)], dim=1)
        if id(obs) in self._known:
            return self._known[id(obs)]
        features = self.norm(features)
        return th.cat([features, self._embed(features)], dim=1)

    @contextmanager
    def remembering(self, *observations: PyTorchObs) -> Iterator[None]:
        """
        Embed observations once for all networks that ask for the same objects inside the block.

        :param observations: each a batch of observations
        """
        if not self.learns_features:
            self._known = {id(obs): self(obs, self.extract_features(obs, self.features_extractor)) for obs in observations}
        try:
            yield
        finally:
            self._known = {}

    def update_norm(self, obs: PyTorchObs) -> None:
        """
        :param obs: observations of a batch
        """
        if not self.learns_features:
            self.norm.update(self.extract_features(obs, self.features_extractor))  # type: ignore[operator]


def representation_loss(
    representation: Representation,
    slow: Representation,
    replay_data: ReplayBufferSamples,
    reward_scale: th.Tensor,
    outcome_weight: float = 0.1,
) -> th.Tensor:
    """
    Squared errors of what a pair's embedding foretells: the next state's embedding, the reward, and the end.

    :param representation: representation that learns
    :param slow: its slow copy, which embeds the next state
    :param replay_data: transitions of one step
    :param reward_scale: unit of rewards, shape ()
    :param outcome_weight: weight of reward and end beside the mean over an embedding's units
    :return: mean over the batch, shape ()
    """
    with th.no_grad():
        next_states = slow.state(replay_data.next_observations)
    pairs = representation.pair(representation.state(replay_data.observations), replay_data.actions)
    foretold = representation.reward_and_end(pairs)
    outcome = th.cat([replay_data.rewards / reward_scale, 3 * replay_data.dones], dim=1)
    return F.mse_loss(pairs, next_states) + outcome_weight * ((foretold - outcome) ** 2).sum(dim=1).mean()
