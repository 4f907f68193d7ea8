"""
Q-score matching as an SB3 off-policy algorithm.
"""

import io
import math
import pathlib
from collections import defaultdict
from importlib.metadata import version
from numbers import Integral, Real
from typing import Any, ClassVar, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, PyTorchObs, ReplayBufferSamples, Schedule
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sb3_qsm.buffers import choose_replay_buffer
from sb3_qsm.losses import (
    SCORE_TARGETS,
    ScoreTarget,
    boltzmann_mean,
    box_entropy,
    posterior_variance,
    score_matching_loss,
    undecided_ent_coef,
)
from sb3_qsm.normalization import RewardScale
from sb3_qsm.policies import (
    CnnPolicy,
    Critic,
    DiffusionActor,
    DiffusionPolicy,
    MlpPolicy,
    MultiInputPolicy,
    lookup,
)
from sb3_qsm.representation import Representation, representation_loss
from sb3_qsm.temperature import Temperature, make_temperature

SelfQSM = TypeVar("SelfQSM", bound="QSM")


class QSM(OffPolicyAlgorithm):
    """
    Q-score matching: a diffusion policy whose score follows the action gradient of Q.

    Paper: https://arxiv.org/abs/2312.11752 (Psenka, Escontrela, Abbeel and Ma, ICML 2024). The default target is the
    box-aware closed form derived in ``docs/algorithm.md``; the paper's own method is :class:`~sb3_qsm.published.PublishedQSM`.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: learning rate of actor and critic, a number or a function of the remaining progress (from 1 to 0)
    :param buffer_size: size of the replay buffer
    :param learning_starts: how many steps of the model to collect transitions for before learning starts
    :param batch_size: Minibatch size for each gradient update
    :param tau: the soft update coefficient ("Polyak update", between 0 and 1)
    :param gamma: the discount factor, also of returns over several steps
    :param train_freq: Update the model every ``train_freq`` steps, or a tuple such as ``(5, "step")`` or ``(2, "episode")``
    :param gradient_steps: How many gradient steps to do after each rollout; ``-1`` for as many as steps in the environments
    :param action_noise: noise added to the sampled action (None by default: the policy explores by itself)
    :param replay_buffer_class: Replay buffer class to use (for instance ``HerReplayBuffer``)
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation.
    :param optimize_memory_usage: Enable a memory efficient variant of the replay buffer at a cost of more complexity.
    :param n_steps: number of steps of the return before the bootstrap, as in SB3 (not for dictionary observations). By default
        three, also for those; one with ``keep_modes``, a ``replay_buffer_class`` (for instance HER), ``optimize_memory_usage``
    :param ent_coef: temperature lambda of the policy exp(Q / lambda), a positive number in units of the return (the inverse of
        the paper's M_q), or ``"auto"`` to learn it (``"auto_0.1"`` starts at 0.1)
    :param target_update_interval: update the target network every ``target_update_interval`` gradient steps.
    :param target_entropy: entropy to hold when learning ``ent_coef``, in nats; ``"auto"`` is minus half the action dimension
    :param policy_delay: update actor and temperature once per ``policy_delay`` updates of the critics, as in TD3
    :param pessimism: which value of the target critics the critics learn: 0 for their mean, 1 for the smallest, as in SAC and
        TD3; halfway between the two by default
    :param ema_decay: share that stays of the running mean of the actor's weights, which gives the deterministic action, at
        each update of the actor (less at first); at 0 the mean is the actor itself
    :param normalize_reward: Whether the critics learn returns in units of the rewards' root mean square, so that learning does
        not depend on the scale of the rewards
    :param score_target: what the denoiser regresses on: "box", "heights" (which learns a variance), "published", or a function
        like :func:`~sb3_qsm.losses.box_score_target`
    :param keep_modes: Whether to keep several good answers through many steps, at some cost where one is best
        (``docs/algorithm.md``, "Several good answers")
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
    critic: Critic
    critic_target: Critic
    representation: Representation | None
    temperature: Temperature
    reward_scale: RewardScale
    replay_buffer: ReplayBuffer

    def __init__(
        self,
        policy: str | type[DiffusionPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
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
        ent_coef: str | float = "auto",
        target_update_interval: int = 1,
        target_entropy: str | float = "auto",
        policy_delay: int = 2,
        pessimism: float = 0.5,
        ema_decay: float = 0.998,
        normalize_reward: bool = True,
        score_target: str | ScoreTarget = "box",
        keep_modes: bool = False,
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
        self.ent_coef = ent_coef
        self.target_update_interval = target_update_interval
        self.target_entropy = target_entropy
        self.policy_delay = policy_delay
        self.pessimism = pessimism
        self.ema_decay = ema_decay
        self.normalize_reward = normalize_reward
        self.score_target = score_target
        self.keep_modes = keep_modes
        self.observations_normalized = False  # by VecNormalize in training; an export without its statistics would be wrong
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        check_arguments(self)
        given = self.n_steps, self.replay_buffer_class, self.replay_buffer_kwargs
        one_step = self.optimize_memory_usage or self.keep_modes
        if self.score_target == "heights":
            self.policy_kwargs = {"learn_variance": True, **self.policy_kwargs}
        self.n_steps, self.replay_buffer_class = choose_replay_buffer(
            self.observation_space, self.n_steps, self.replay_buffer_class, one_step
        )
        if self.replay_buffer_class is not None and self.n_steps > 1 and given[1] is None:
            self.replay_buffer_kwargs = {"n_steps": self.n_steps, "gamma": self.gamma, **self.replay_buffer_kwargs}
            self.n_steps = 1  # SB3 warns of a number beside a class
        super()._setup_model()
        # What the user gave, so that save() and load() do not take the choice for the user's
        self.n_steps, self.replay_buffer_class, self.replay_buffer_kwargs = given
        self.actor, self.critic, self.critic_target = self.policy.actor, self.policy.critic, self.policy.critic_target
        self.representation = self.actor.representation
        self.temperature = make_temperature(self.ent_coef, self.target_entropy, self.actor.action_dim).to(self.device)
        self.reward_scale = RewardScale(1e-2 if self.normalize_reward else 0.0).to(self.device)
        self._score_target: ScoreTarget = lookup("score_target", self.score_target, SCORE_TARGETS)

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Update critics and representation, and at every ``policy_delay``-th step actor and temperature.

        :param gradient_steps: number of batches
        :param batch_size: transitions in each
        :raises ValueError: if a loss is not finite
        """
        self.policy.set_training_mode(True)
        self._update_learning_rate([network.optimizer for network in self._learning().values()])
        follow_gamma(self)
        metrics: dict[str, list[th.Tensor]] = defaultdict(list)

        for _ in range(gradient_steps):
            replay_data = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            if self._n_updates % 10 == 0:  # a number that moves slowly
                self.reward_scale.update(rewards_per_step(replay_data, self.gamma))

            with self.actor.remembering(replay_data.observations, replay_data.next_observations):
                critic_loss = self._critic_loss(replay_data)
                gradient_step(self.critic.optimizer, critic_loss, "critic_loss")
                values = {"critic_loss": critic_loss}

                if self._n_updates % self.policy_delay == 0:
                    td_error = (critic_loss.detach() / self.critic.n_critics).sqrt()
                    actor_loss, entropy, q_grad = self._actor_loss(replay_data, td_error)
                    gradient_step(self.actor.optimizer, actor_loss, "actor_loss")
                    self.actor.update_average(self.ema_decay)
                    values |= {"actor_loss": actor_loss, "entropy": entropy, "q_grad": q_grad}
                    values |= {"ent_coef": self.temperature.value(), "ent_coef_loss": self.temperature.update(entropy)}

            values |= self._update_representation(replay_data)
            for name, value in values.items():
                metrics[name].append(value.detach())
            self._n_updates += 1
            if self._n_updates % self.target_update_interval == 0:
                polyak_update(self.critic, self.critic_target, self.tau)

        for name, of_updates in metrics.items():
            self.logger.record_mean(f"train/{name}", sum(finite(name, value) for value in of_updates) / len(of_updates))
        self.logger.record("train/reward_scale", self.reward_scale.value().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _update_representation(self, replay_data: ReplayBufferSamples) -> dict[str, th.Tensor]:
        """
        One step of the representation, if there is one, followed by its slow copy, through which actor and critics look.

        :param replay_data: batch of transitions; single steps of the same number, where the replay buffer gives longer returns
        :return: loss by its name, shape ()
        """
        representation, slow = self.representation, self.actor.slow_representation
        if representation is None or slow is None:
            return {}
        sample_transitions = getattr(self.replay_buffer, "sample_transitions", None)
        if sample_transitions is not None:
            replay_data = sample_transitions(len(replay_data.actions), env=self._vec_normalize_env)
        loss = representation_loss(representation, slow, replay_data, self.reward_scale.value())
        gradient_step(representation.optimizer, loss, "representation_loss")
        if self._n_updates % 10 == 0:  # numbers that move slowly
            representation.update_norm(replay_data.observations)
        polyak_update(representation, slow, self.tau)
        return {"representation_loss": loss}

    def _learning(self) -> dict[str, Any]:
        """
        :return: networks that have an optimizer, by the names of the model's attributes
        """
        return {name: net for name in ("actor", "critic", "representation") if (net := getattr(self, name)) is not None}

    def _critic_loss(self, replay_data: ReplayBufferSamples) -> th.Tensor:
        """
        Temporal-difference error of all critics, in units of the reward scale.

        :param replay_data: batch of transitions
        :return: sum over critics of the mean squared error, shape ()
        """
        discounts = replay_data.discounts if replay_data.discounts is not None else self.gamma
        with th.no_grad():
            next_values = self._next_values(replay_data.next_observations)
            rewards = replay_data.rewards / self.reward_scale.value()
            target_q_values = rewards + (1 - replay_data.dones) * discounts * next_values
        q_values = self.critic(replay_data.observations, replay_data.actions)
        return th.stack([F.mse_loss(q_value, target_q_values) for q_value in q_values]).sum()

    def _next_values(self, next_observations: PyTorchObs) -> th.Tensor:
        """
        :param next_observations: observations after the transition
        :return: what the target critics make of the policy there, shape (B, 1)
        """

        def of_a_draw() -> th.Tensor:
            return self._value(self.critic_target, next_observations, self._next_actions(next_observations))

        if not self.keep_modes:
            return of_a_draw()
        return boltzmann_mean(th.stack([of_a_draw(), of_a_draw()]), self._ent_coef())

    def _value(self, critic: Critic, observations: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        :param critic: critics to ask
        :param observations: observations
        :param actions: scaled actions, shape (B, A)
        :return: their mean, moved towards the smallest by ``pessimism``, shape (B, 1)
        """
        q_values = th.cat(critic(observations, actions), dim=1)
        return q_values.mean(dim=1, keepdim=True).lerp(q_values.min(dim=1, keepdim=True).values, self.pessimism)

    def _next_actions(self, next_observations: PyTorchObs) -> th.Tensor:
        """
        :param next_observations: observations after the transition
        :return: scaled actions at which the target critics are asked, shape (B, A)
        """
        return self.actor(next_observations)

    def _ent_coef(self) -> th.Tensor:
        """
        :return: temperature in units of the reward scale, as values are, shape ()
        """
        return self.temperature.value() / self.reward_scale.value()

    def _actor_loss(self, replay_data: ReplayBufferSamples, td_error: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        Q-score matching at noised replay actions.

        :param replay_data: batch of transitions
        :param td_error: root mean square error of a critic, in units of the reward scale, shape ()
        :return: squared error of the denoised action in units of the network's output; estimate of the policy's entropy in
            nats; mean size of dQ/da in units of the return; each of shape ()
        """
        observations, actions = replay_data.observations, replay_data.actions
        t = th.randint(len(self.actor.ratios), (len(actions),), device=self.device)
        ratio = self.actor.ratios[t, None]
        noisy_actions = (actions + ratio * th.randn_like(actions)).requires_grad_(self.actor.learn_variance)
        denoised, variance = self.actor.denoise(observations, noisy_actions, t)

        def q_fn(actions: th.Tensor) -> th.Tensor:
            return th.cat(self.critic(observations, actions), dim=1).mean(dim=1, keepdim=True)

        ent_coef = self._ent_coef()
        level_ent_coef = undecided_ent_coef(ent_coef, ratio, td_error) if self.keep_modes else ent_coef
        answer = denoised.detach(), variance.detach(), noisy_actions.detach()
        target, q_grad = self._score_target(q_fn, *answer, ratio, level_ent_coef)
        c_out = self.actor.preconditioning(ratio).c_out
        loss = score_matching_loss(denoised, target, c_out)
        if self.actor.learn_variance:
            loss = loss + score_matching_loss(variance, posterior_variance(denoised, noisy_actions, ratio), c_out**2)
        entropy = box_entropy(q_grad / ent_coef).sum(dim=1).mean()
        return loss, entropy, self.reward_scale.value() * q_grad.abs().mean()

    def learn(
        self: SelfQSM,
        total_timesteps: int | float,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "QSM",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfQSM:
        self.observations_normalized = self._vec_normalize_env is not None and self._vec_normalize_env.norm_obs
        return super().learn(
            total_timesteps=int(total_timesteps),  # 1e6 is a float
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )

    def save(self, *args: Any, **kwargs: Any) -> None:
        """
        As SB3's, with the version of this package in the file: ``sb3_qsm_version`` of a loaded model.
        """
        self.sb3_qsm_version = version("sb3_qsm")
        super().save(*args, **kwargs)

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        super().load_replay_buffer(path, truncate_last_traj)
        follow_gamma(self)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "actor", "critic", "critic_target", "representation", "_score_target"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", *(f"{name}.optimizer" for name in self._learning()), "temperature", "reward_scale"], []


def check_arguments(model: QSM) -> None:
    """
    :param model: model with its arguments; SB3 checks its own
    :raises ValueError: for the first argument of QSM's own that is out of its range
    """
    if not issubclass(model.policy_class, DiffusionPolicy):
        raise ValueError(
            f"policy must be one of {sorted(model.policy_aliases)} or a subclass of DiffusionPolicy, got "
            f"{model.policy_class.__qualname__}: perhaps another algorithm's policy or file"
        )
    own = [("policy_delay", Integral, math.inf), ("pessimism", Real, 1), ("ema_decay", Real, 1)]
    for name, kind, high in own if model.n_steps is None else [("n_steps", Integral, math.inf), *own]:
        value, low = getattr(model, name), int(kind is Integral)
        if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:  # type: ignore[operator]
            raise ValueError(f"{name} must be {kind.__name__.lower()} and within [{low}, {high}], got {value!r}")
    for name in ("normalize_reward", "keep_modes"):
        if not isinstance(getattr(model, name), bool):
            raise ValueError(f"{name} must be True or False, got {getattr(model, name)!r}")
    if model.score_target == "heights" and not model.policy_kwargs.get("learn_variance", True):
        raise ValueError("learn_variance must be True with score_target='heights', got False")


def follow_gamma(model: QSM) -> None:
    """
    Returns over several steps follow the model's discount factor, which a file or the user may have changed, unless the
    replay buffer was given one of its own.

    :param model: model with its replay buffer
    """
    if "gamma" not in model.replay_buffer_kwargs:
        model.replay_buffer.gamma = model.gamma  # type: ignore[attr-defined]


def rewards_per_step(replay_data: ReplayBufferSamples, gamma: float) -> th.Tensor:
    """
    :param replay_data: batch of transitions
    :param gamma: discount factor
    :return: returns over several steps, divided by the sum of their discounts, shape (B, 1)
    """
    if replay_data.discounts is None or gamma == 1:
        return replay_data.rewards
    return replay_data.rewards * ((1 - gamma) / (1 - replay_data.discounts))


def gradient_step(optimizer: th.optim.Optimizer, loss: th.Tensor, name: str) -> None:
    """
    :param optimizer: optimizer of the parameters to change
    :param loss: shape ()
    :param name: name of the loss
    :raises ValueError: if the loss is not finite, before it reaches a weight; on a GPU, where looking at it would make the
        update wait for the device, ``train`` says so at its end
    """
    if loss.device.type == "cpu":
        finite(name, loss)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def finite(name: str, value: th.Tensor) -> float:
    """
    :param name: what is checked
    :param value: shape ()
    :return: the number
    :raises ValueError: if it is NaN or infinite
    """
    if not math.isfinite(number := value.item()):
        raise ValueError(f"{name} must be finite, got {number}: see VecCheckNan of SB3 for broken observations and rewards")
    return number


@th.no_grad()
def polyak_update(network: th.nn.Module, target: th.nn.Module, tau: float) -> None:
    """
    SB3's ``polyak_update``, for all parameters at once (a fifth of its time), and a copy of the batch norms' statistics.

    :param network: network that learns
    :param target: network of the same kind that follows it
    :param tau: share of the way to ``network``
    """
    get_ema_multi_avg_fn(1 - tau)(list(target.parameters()), list(network.parameters()), 0)
    for slow_buffer, buffer in zip(target.buffers(), network.buffers(), strict=True):
        slow_buffer.copy_(buffer)
