"""
SAC and TD3 on QSM's representation, critics, returns and buffer: what of a result is the critics', and what the policy's?

Legend: B batch, A action dimension. Scaled actions are in [-1, 1].
"""

import math
from typing import Any, ClassVar

import numpy as np
import torch as th
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import create_mlp
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn
from torch.nn import functional as F

from sb3_qsm import QSM, DiffusionPolicy
from sb3_qsm.networks import Denoiser
from sb3_qsm.policies import DiffusionActor


class GaussianHead(Denoiser):
    """
    Perceptron from features to mean and log standard deviation of a squashed normal; there is no noisy action to see.

    Arguments as for :class:`~sb3_qsm.networks.Denoiser`.
    """

    def __init__(
        self, features_dim: int, action_dim: int, n_diffusion_steps: int, net_arch: list[int], output_dim: int
    ) -> None:
        super().__init__(features_dim, action_dim, n_diffusion_steps, net_arch, output_dim)
        self.layers = nn.Sequential(*create_mlp(features_dim, 2 * action_dim, net_arch))

    def forward(self, features: th.Tensor, noisy_actions: th.Tensor, t: int | th.Tensor) -> th.Tensor:
        """
        :return: mean and log standard deviation, shape (B, 2 A)
        """
        return self.layers(features)


class GaussianActor(DiffusionActor):
    """
    A squashed normal in the place of the chain: one step, whose noise is the action's.

    Arguments as for :class:`~sb3_qsm.policies.DiffusionActor`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, n_diffusion_steps=1, denoiser_class=GaussianHead)

    def sample_with_log_prob(self, obs: th.Tensor, noise: th.Tensor, average: bool = False) -> tuple[th.Tensor, th.Tensor]:
        """
        :param obs: observations
        :param noise: standard normal, of which the first row is used, shape (2, B, A)
        :param average: whether to use the running mean of the weights
        :return: scaled actions, shape (B, A), and the log of their density, shape (B, 1)
        """
        networks: Any = self.average if average else self.networks()
        features = self.extract_features(obs, networks["features_extractor"])
        mean, log_std = networks["denoiser"](features, noise[0], 0).chunk(2, dim=1)
        log_std = log_std.clamp(-20, 2)
        u = mean + log_std.exp() * noise[0]
        log_prob = -0.5 * noise[0] ** 2 - log_std - 0.5 * math.log(2 * math.pi)
        squashing = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2), stable far out
        return u.tanh(), (log_prob - squashing).sum(dim=1, keepdim=True)

    def sample(self, obs: Any, noise: th.Tensor, average: bool = False) -> th.Tensor:
        """As the base class's, with noise of shape (2, B, A)."""
        return self.sample_with_log_prob(obs, noise, average)[0]


class DeterministicActor(GaussianActor):
    """
    The mean alone.

    Arguments as for :class:`~sb3_qsm.policies.DiffusionActor`.
    """

    def sample(self, obs: Any, noise: th.Tensor, average: bool = False) -> th.Tensor:
        """As the base class's, whatever the noise."""
        return super().sample(obs, th.zeros_like(noise), average)


class GaussianPolicy(DiffusionPolicy):
    """QSM's policy with :class:`GaussianActor`."""

    actor_class = GaussianActor


class DeterministicPolicy(DiffusionPolicy):
    """QSM's policy with :class:`DeterministicActor`."""

    actor_class = DeterministicActor


class SACActor(QSM):
    """
    SAC (Haarnoja et al., 2018, arXiv:1812.05905): climb Q minus the temperature times the log of the density, which the value
    of the next state counts, too; target entropy -A; one update of the actor for each of the critics, and, as in SAC, no
    running mean of its weights. All else is QSM's.

    :param policy: as for QSM
    :param env: as for QSM
    :param kwargs: arguments of QSM
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": GaussianPolicy}
    actor: GaussianActor

    def __init__(self, policy: Any, env: Any, **kwargs: Any) -> None:
        super().__init__(policy, env, **{"policy_delay": 1, "ema_decay": 0.0, **kwargs})

    def _setup_model(self) -> None:
        if self.target_entropy == "auto":
            self.target_entropy = -float(np.prod(self.action_space.shape or ()))
        super()._setup_model()

    def _draw(self, observations: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param observations: shape (B, ...)
        :return: actions, shape (B, A), and the temperature times the log of their density, in units of values, shape (B, 1)
        """
        noise = th.randn(2, len(observations), self.actor.action_dim, device=self.device)
        actions, log_prob = self.actor.sample_with_log_prob(observations, noise)
        return actions, self._ent_coef() * log_prob

    def _next_values(self, next_observations: Any) -> th.Tensor:
        actions, penalty = self._draw(next_observations)
        return self._value(self.critic_target, next_observations, actions) - penalty

    def _actor_loss(self, replay_data: ReplayBufferSamples, td_error: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param replay_data: batch of transitions
        :return: loss, entropy of the drawn actions, no gradient of Q; each of shape ()
        """
        observations: Any = replay_data.observations
        actions, penalty = self._draw(observations)
        values = self._value(self.critic, observations, actions)
        return (penalty - values).mean(), -(penalty / self._ent_coef()).mean(), th.zeros(())


class TD3Actor(QSM):
    """
    TD3 (Fujimoto et al., 2018, arXiv:1802.09477): climb Q with a deterministic actor; noise N(0, 0.1^2) on the behaviour,
    N(0, 0.2^2) cut at 0.5 on the next action; as in TD3, no running mean of the actor's weights. All else is QSM's.

    :param policy: as for QSM
    :param env: as for QSM
    :param kwargs: arguments of QSM
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": DeterministicPolicy}

    def __init__(self, policy: Any, env: Any, **kwargs: Any) -> None:
        super().__init__(policy, env, **{"ent_coef": 1.0, "ema_decay": 0.0, **kwargs})

    def _setup_model(self) -> None:
        super()._setup_model()
        action_dim = self.actor.action_dim
        self.action_noise = NormalActionNoise(np.zeros(action_dim), np.full(action_dim, 0.1))

    def _next_actions(self, next_observations: Any) -> th.Tensor:
        actions = super()._next_actions(next_observations)
        return (actions + (0.2 * th.randn_like(actions)).clamp(-0.5, 0.5)).clamp(-1, 1)

    def _actor_loss(self, replay_data: ReplayBufferSamples, td_error: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param replay_data: batch of transitions
        :return: loss; no entropy and no gradient of Q; each of shape ()
        """
        observations = replay_data.observations
        return -self._value(self.critic, observations, self.actor(observations)).mean(), th.zeros(()), th.zeros(())
