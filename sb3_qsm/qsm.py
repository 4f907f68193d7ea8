"""
Q-score matching as an SB3 off-policy algorithm.
"""

import io
import math
import pathlib
import sys
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, ReplayBufferSamples, Schedule, TensorDict
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sb3_qsm.buffers import NStepDictReplayBuffer, cut_returns
from sb3_qsm.losses import SCORE_TARGETS, ScoreTarget, box_entropy, score_matching_loss
from sb3_qsm.policies import CnnPolicy, DiffusionActor, DiffusionPolicy, MlpPolicy, MultiInputPolicy, ScaledCritic, lookup
from sb3_qsm.temperature import Temperature, make_temperature

SelfQSM = TypeVar("SelfQSM", bound="QSM")

# Accepted type, smallest and largest value of each number that the constructor takes
NUMBERS: dict[str, tuple[type, float, float]] = {
    "buffer_size": (Integral, 1, math.inf),
    "learning_starts": (Integral, 0, math.inf),
    "batch_size": (Integral, 1, math.inf),
    "tau": (Real, 0, 1),
    "gamma": (Real, 0, 1),
    "gradient_steps": (Integral, -1, math.inf),
    "n_steps": (Integral, 1, math.inf),
    "policy_delay": (Integral, 1, math.inf),
    "actor_tau": (Real, 0, 1),
    "target_update_interval": (Integral, 1, math.inf),
    "target_policy_noise": (Real, 0, sys.float_info.max),
    "pessimism": (Real, 0, 1),
    "actor_lr_decay_updates": (Real, 1, math.inf),
    "stats_window_size": (Integral, 1, math.inf),
    "seed": (Integral, 0, 2**32 - 1),
}
# Accepted type of each other argument that SB3 does not check itself
TYPES: dict[str, type] = {
    "action_noise": ActionNoise,
    "replay_buffer_kwargs": dict,
    "optimize_memory_usage": bool,
    "policy_kwargs": dict,
}


class QSM(OffPolicyAlgorithm):
    """
    Q-score matching: a diffusion policy whose score follows the action gradient of Q.

    Paper: https://arxiv.org/abs/2312.11752 (Psenka, Escontrela, Abbeel and Ma, ICML 2024). The default target is the
    box-aware closed form derived in ``docs/algorithm.md``; ``score_target="published"`` is the paper's.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: learning rate of actor and critic, a number or a function of the remaining progress (from 1 to 0)
    :param buffer_size: size of the replay buffer
    :param learning_starts: how many steps of the model to collect transitions for before learning starts
    :param batch_size: Minibatch size for each gradient update
    :param tau: the soft update coefficient ("Polyak update", between 0 and 1)
    :param gamma: the discount factor (a replay buffer keeps the one that its returns over several steps were made with)
    :param train_freq: Update the model every ``train_freq`` steps, or a tuple such as ``(5, "step")`` or ``(2, "episode")``
    :param gradient_steps: How many gradient steps to do after each rollout; ``-1`` for as many as steps in the environments
    :param action_noise: noise added to the sampled action (None by default: the policy explores by itself)
    :param replay_buffer_class: Replay buffer class to use (for instance ``HerReplayBuffer``)
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation.
    :param optimize_memory_usage: Enable a memory efficient variant of the replay buffer at a cost of more complexity.
    :param n_steps: number of steps of the return before the bootstrap, as in SB3 (not for dictionary observations). By default
        three, also for those; one with a ``replay_buffer_class`` (for instance HER) or ``optimize_memory_usage``
    :param policy_delay: update actor and temperature once per ``policy_delay`` updates of the critics, as in TD3
    :param actor_tau: the soft update coefficient of the actor that :meth:`predict` uses, a running mean of the one that learns
        and explores, at each update of the actor (larger at first); at 1 they are the same
    :param value_scale: unit of the critics' networks, a positive number, or ``"auto"`` for the root mean square of
        the rewards so far, so that learning does not depend on their scale
    :param ent_coef: temperature lambda of the policy exp(Q / lambda), a positive number (the inverse of the paper's M_q),
        or ``"auto"`` to learn it (``"auto_0.1"`` starts at 0.1)
    :param target_update_interval: update the target network every ``target_update_interval`` gradient steps.
    :param target_entropy: entropy to hold when learning ``ent_coef``, in nats; ``"auto"`` is minus half the action dimension
    :param score_target: what the denoiser regresses on: "box", "published", or a function like
        :func:`~sb3_qsm.losses.box_score`
    :param target_policy_noise: Standard deviation of normal noise added to the next action in the critic's target
    :param pessimism: which value of the target critics the critics learn: 0 for their mean, 1 for the smallest, as in SAC and
        TD3; halfway between the two by default
    :param actor_lr_decay_updates: cosine-decay the actor's learning rate to zero over that many updates; never by default
    :param stats_window_size: Window size for the rollout logging, in episodes
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments for the policy, see :class:`~sb3_qsm.policies.DiffusionPolicy`
    :param verbose: Verbosity level: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run.
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: for an argument out of its range; the message names the argument, its value and the range
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: DiffusionPolicy
    actor: DiffusionActor
    online_actor: DiffusionActor
    critic: ScaledCritic
    critic_target: ScaledCritic
    temperature: Temperature

    def __init__(
        self,
        policy: str | type[DiffusionPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 6e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.01,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int | None = None,
        policy_delay: int = 2,
        actor_tau: float = 0.002,
        value_scale: str | float = "auto",
        ent_coef: str | float = "auto",
        target_update_interval: int = 1,
        target_entropy: str | float = "auto",
        score_target: str | ScoreTarget = "box",
        target_policy_noise: float = 0.0,
        pessimism: float = 0.5,
        actor_lr_decay_updates: float = math.inf,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,  # type: ignore[arg-type]
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            sde_support=False,
            supported_action_spaces=(spaces.Box,),
            support_multi_env=True,
        )
        self.policy_delay = policy_delay
        self.actor_tau = actor_tau
        self.value_scale = value_scale
        self.ent_coef = ent_coef
        self.target_update_interval = target_update_interval
        self.target_entropy = target_entropy
        self.score_target = score_target
        self.target_policy_noise = target_policy_noise
        self.pessimism = pessimism
        self.actor_lr_decay_updates = actor_lr_decay_updates
        self.stats_window_size = stats_window_size
        self._squared_rewards = [0.0, 0]  # their sum and number; not in _setup_model, so that load() keeps them
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self._check_arguments()
        self._score_target = lookup("score_target", self.score_target, SCORE_TARGETS)
        given = self.n_steps, self.replay_buffer_class, self.replay_buffer_kwargs
        no_class = self.replay_buffer_class is None
        dictionaries = isinstance(self.observation_space, spaces.Dict)
        refused = dictionaries and self.n_steps is not None  # by SB3, whose tests ask for it
        self.n_steps = self.n_steps or (3 if no_class and not self.optimize_memory_usage else 1)
        if no_class and self.n_steps > 1 and not refused:
            self.replay_buffer_class = NStepDictReplayBuffer if dictionaries else NStepReplayBuffer
            self.replay_buffer_kwargs = {"n_steps": self.n_steps, "gamma": self.gamma, **self.replay_buffer_kwargs}
            self.n_steps = 1  # SB3 warns of a number beside a class
        super()._setup_model()
        # What the user gave, so that save(), load() and resume() do not take the choice for the user's
        self.n_steps, self.replay_buffer_class, self.replay_buffer_kwargs = given
        if self.train_freq.frequency < 1:  # type: ignore[union-attr]
            raise ValueError(f"train_freq must be at least 1, got {self.train_freq!r}")
        self.actor, self.online_actor = self.policy.actor, self.policy.online_actor
        self.critic, self.critic_target = self.policy.critic, self.policy.critic_target
        self._metrics: list[tuple[str, th.Tensor]] = []
        self.temperature = make_temperature(self.ent_coef, self.target_entropy, self.actor.action_dim).to(self.device)

    def _check_arguments(self) -> None:
        """
        :raises ValueError: for the first constructor argument of a wrong type or out of its range
        """
        if not hasattr(self, "action_space"):
            raise ValueError("env must be an environment or the id of one, got None")
        actions = self.action_space
        if not np.issubdtype(actions.dtype, np.floating) or not (actions.low < actions.high).all():  # type: ignore[attr-defined]
            raise ValueError(f"action_space must be a Box of floats with low < high in each dimension, got {actions}")
        buffer_class = self.replay_buffer_class
        if buffer_class is not None and not (isinstance(buffer_class, type) and issubclass(buffer_class, ReplayBuffer)):
            raise ValueError(f"replay_buffer_class must be a subclass of ReplayBuffer, got {buffer_class!r}")
        for name, wanted in TYPES.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, wanted):
                raise ValueError(f"{name} must be of type {wanted.__name__}, got {value!r}")
        scale = self.value_scale
        if scale != "auto" and (not isinstance(scale, Real) or isinstance(scale, bool) or not 0 < scale < math.inf):
            raise ValueError(f'value_scale must be a positive number or "auto", got {scale!r}')
        numbers = NUMBERS if callable(self.learning_rate) else NUMBERS | {"learning_rate": (Real, 0, sys.float_info.max)}
        for name, (kind, low, high) in numbers.items():
            value = getattr(self, name)
            if value is None and name in ("n_steps", "seed"):
                continue
            if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:  # type: ignore[operator]
                raise ValueError(f"{name} must be {kind.__name__.lower()} and within [{low}, {high}], got {value!r}")

    def train(self, gradient_steps: int, batch_size: int = 256) -> None:
        self._metrics.clear()
        self.policy.set_training_mode(True)
        self._update_learning_rate([self.online_actor.optimizer, self.critic.optimizer])
        decay = 0.5 * (1 + math.cos(math.pi * min(1, self._n_updates / self.actor_lr_decay_updates)))
        for group in self.online_actor.optimizer.param_groups:
            group["lr"] *= decay
        self._set_value_scale()

        for _ in range(gradient_steps):
            replay_data = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)  # type: ignore[union-attr]

            self._optimize("critic_loss", self._critic_loss(replay_data), self.critic.optimizer)
            if self._n_updates % self.policy_delay == 0:
                self._optimize("actor_loss", self._actor_loss(replay_data), self.online_actor.optimizer)
                # Larger steps at first, as in TensorFlow's moving averages: the mean of a short run is not to be its start
                n_actor_updates = self._n_updates // self.policy_delay
                move_slow_copy(self.actor, self.online_actor, max(self.actor_tau, 9 / (10 + n_actor_updates)))

            self._n_updates += 1
            if self._n_updates % self.target_update_interval == 0:
                move_slow_copy(self.critic_target, self.critic, self.tau)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/value_scale", self.critic.scale.item())
        self._log_metrics()

    def _set_value_scale(self) -> None:
        """
        Give the critics their unit. With "auto" it stays what it was, one in a new model, until the first reward.
        """
        total, number = self._squared_rewards
        measured = math.sqrt(total / number) if total > 0 else self.critic.scale
        scale = measured if self.value_scale == "auto" else float(self.value_scale)
        for critic in (self.critic, self.critic_target):
            critic.scale.fill_(scale)

    def _optimize(self, name: str, loss: th.Tensor, optimizer: th.optim.Optimizer) -> None:
        """
        One step of an optimizer.

        :param name: name of the loss
        :param loss: shape ()
        :param optimizer: optimizer of the parameters to change
        """
        self._record(name, loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def _record(self, name: str, value: th.Tensor) -> None:
        """
        Note a metric. One that is not finite stops the run before it reaches a weight; on a GPU only at the end of
        ``train()``, since looking at it would make the update wait for the device.

        :param name: name of the metric
        :param value: shape ()
        """
        self._metrics.append((name, value.detach()))
        if value.device.type == "cpu":
            check_finite(name, value.item(), self.num_timesteps)

    def _log_metrics(self) -> None:
        """
        Hand the metrics of the updates to the logger. Until then a GPU may be behind.
        """
        for name, tensor in self._metrics:
            value = tensor.item()
            check_finite(name, value, self.num_timesteps)
            self.logger.record_mean(f"train/{name}", value)

    def _critic_loss(self, replay_data: ReplayBufferSamples) -> th.Tensor:
        """
        Temporal-difference error of all critics against the target critics at a sampled next action: their mean, moved
        towards the smallest by ``pessimism``.

        :param replay_data: batch of transitions
        :return: sum over critics of the mean squared error in units of ``value_scale``, shape ()
        """
        discounts = replay_data.discounts if replay_data.discounts is not None else self.gamma
        with th.no_grad():
            next_actions = self.online_actor(replay_data.next_observations)
            noise = self.target_policy_noise * th.randn_like(next_actions)
            next_actions = (next_actions + noise).clamp(-1, 1)
            next_q_values = th.cat(self.critic_target(replay_data.next_observations, next_actions), dim=1)
            smallest = next_q_values.min(dim=1, keepdim=True).values
            next_q_values = next_q_values.mean(dim=1, keepdim=True).lerp(smallest, self.pessimism)
            target_q_values = replay_data.rewards + (1 - replay_data.dones) * discounts * next_q_values
        q_values = self.critic(replay_data.observations, replay_data.actions)
        scale = self.critic.scale
        return sum(F.mse_loss(q_value / scale, target_q_values / scale) for q_value in q_values)  # type: ignore[return-value]

    def _actor_loss(self, replay_data: ReplayBufferSamples) -> th.Tensor:
        """
        Q-score matching at noised replay actions, and one step of the temperature.

        :param replay_data: batch of transitions
        :return: squared error of the denoised action in units of the network's output, shape ()
        """
        schedule, observations = self.actor.noise_schedule, replay_data.observations
        t = th.randint(schedule.n_steps, (len(replay_data.actions),), device=self.device)
        noisy_actions = schedule.add_noise(replay_data.actions, th.randn_like(replay_data.actions), t)
        alpha, sigma = schedule.alpha[t, None], schedule.sigma[t, None]

        def q_fn(actions: th.Tensor) -> th.Tensor:
            return th.cat(self.critic(observations, actions), dim=1).mean(dim=1, keepdim=True)

        ent_coef = self.temperature.value()
        denoised = self.online_actor.denoise(observations, noisy_actions, t)
        target, q_grad = self._score_target(q_fn, denoised.detach(), noisy_actions, alpha, sigma, ent_coef)

        entropy = box_entropy(q_grad / ent_coef).sum(dim=1).mean()
        self._record("entropy", entropy)
        self._record("ent_coef", ent_coef)
        self._record("ent_coef_loss", self.temperature.update(entropy))
        self._record("q_grad", q_grad.abs().mean())
        return score_matching_loss(denoised, target, self.actor.c_out[t, None])

    def _sample_action(self, *args: Any, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
        """
        Explore with the actor that learns, not with its running mean.
        """
        self.policy.exploring = True
        try:
            return super()._sample_action(*args, **kwargs)
        finally:
            self.policy.exploring = False

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        terminal_obs = [info["terminal_observation"] for info in infos if info.get("terminal_observation") is not None]
        for name, value in [("observation", self._last_obs), ("reward", reward), ("action", buffer_action)]:
            check_finite(name, value, self.num_timesteps)
        for value in [new_obs, *terminal_obs]:
            check_finite("observation", value, self.num_timesteps)
        self._squared_rewards = [self._squared_rewards[0] + float(reward @ reward), self._squared_rewards[1] + len(reward)]
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def dump_logs(self) -> None:
        """
        Write log data, with the spread of the actions that the policy draws for the present observation.
        """
        observations, _ = self.policy.obs_to_tensor(self._last_obs)  # type: ignore[arg-type]
        if isinstance(observations, dict):
            observations = {key: value[:1].expand(32, *value.shape[1:]) for key, value in observations.items()}
        else:
            observations = observations[:1].expand(32, *observations.shape[1:])
        # A generator of its own: how often one logs must not change what is learnt
        generator = th.Generator().manual_seed(0)
        noise = th.randn(self.actor.noise_schedule.n_steps + 1, 32, self.actor.action_dim, generator=generator)
        self.policy.set_training_mode(False)
        with th.no_grad():
            actions = self.actor.sample(observations, noise.to(self.device))
        self.logger.record("train/action_std", actions.std(dim=0).mean().item())
        self.logger.record("train/saturation", (actions.abs() > 0.99).float().mean().item())
        super().dump_logs()

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[int, BaseCallback]:
        buffer = self.replay_buffer
        if (reset_num_timesteps or self._last_obs is None) and isinstance(buffer, NStepReplayBuffer) and buffer.size() > 0:
            cut_returns(buffer)  # SB3 resets the environment here
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args, **kwargs)

    def learn(
        self: SelfQSM,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "QSM",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfQSM:
        return super().learn(
            total_timesteps=int(total_timesteps),  # 1e6 is a float
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model in a zip-file, as in SB3; a broken model is refused, so that it never replaces a good file.

        :param path: path to the file where the rl agent should be saved
        :param exclude: name of parameters that should be excluded in addition to the default ones
        :param include: name of parameters that might be excluded but should be included anyway
        :raises ValueError: if a weight is not finite
        """
        for name, weight in [*self.policy.state_dict().items(), *self.temperature.state_dict().items()]:
            check_finite(f"weight {name}", weight.cpu().numpy(), self.num_timesteps)
        super().save(path, exclude, include)

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        super().set_parameters(load_path_or_dict, exact_match, device)
        # A new model has no rewards of its own that say what its critics' unit is: they keep the one they were trained with,
        # which counts like the rewards of a full buffer
        if self._squared_rewards[1] == 0 and self.critic.scale != 1:
            self._squared_rewards = [self.buffer_size * self.critic.scale.item() ** 2, self.buffer_size]

    def _excluded_save_params(self) -> list[str]:
        own = ["actor", "online_actor", "critic", "critic_target", "_score_target", "_metrics"]
        return [*super()._excluded_save_params(), *own]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "online_actor.optimizer", "critic.optimizer", "temperature"], []


@th.no_grad()
def move_slow_copy(slow_copy: th.nn.Module, network: th.nn.Module, tau: float) -> None:
    """
    SB3's ``polyak_update``, for all parameters at once (a fifth of its time), and a copy of the batch norms' statistics.

    :param slow_copy: network to change
    :param network: network of the same kind
    :param tau: share of the way to ``network``
    """
    get_ema_multi_avg_fn(1 - tau)(list(slow_copy.parameters()), list(network.parameters()), 0)
    for slow_buffer, buffer in zip(slow_copy.buffers(), network.buffers(), strict=True):
        slow_buffer.copy_(buffer)


def check_finite(name: str, value: Any, num_timesteps: int) -> None:
    """
    :param name: what is checked
    :param value: a number, an array, or a dictionary of arrays
    :param num_timesteps: when, in environment steps
    :raises ValueError: if ``value`` holds a NaN or an infinite number
    """
    for array in value.values() if isinstance(value, dict) else [value]:
        if not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite, got {array} after {num_timesteps} steps")
