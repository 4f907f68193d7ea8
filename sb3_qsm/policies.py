"""
The diffusion policy in SB3's form: a denoising actor that learns, its slow copy that acts, twin critics and their targets.

Legend: B batch, A action dimension, F features, T diffusion steps. Scaled actions are in [-1, 1].
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy, ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    create_mlp,
    get_actor_critic_arch,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_qsm.networks import DENOISERS, PRECONDITIONINGS, Denoiser, Preconditioning
from sb3_qsm.samplers import SAMPLERS, DenoiseFn
from sb3_qsm.schedules import BETA_SCHEDULES, NoiseSchedule

SelfPolicy = TypeVar("SelfPolicy", bound="DiffusionPolicy")


def lookup(argument: str, value: Any, choices: dict[str, Any]) -> Any:
    """
    The choice that goes by a name; a function stands for itself.

    :param argument: name of the argument, for the error
    :param value: a key of ``choices``, or a function
    :param choices: what can be chosen
    :return: the choice
    :raises ValueError: if ``value`` is neither
    """
    if callable(value):
        return value
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{argument} must be one of {sorted(choices)}, got {value!r}")
    return choices[value]


class DiffusionActor(BasePolicy):
    """
    Actor network of QSM: denoises random numbers into an action, given the observation.

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: Units of each hidden layer of the denoiser
    :param features_extractor: Network to extract features
    :param features_dim: Number of features
    :param normalize_images: Whether to divide images by 255.0
    :param n_diffusion_steps: Number of denoising steps T
    :param beta_schedule: Noise levels: "box", "cosine", "linear", "vp", or a function from T to betas of shape (T,)
    :param sampler: Reverse chain: "ddpm", "ddim", "running_clip", or a function like :func:`~sb3_qsm.samplers.ddpm_sample`
    :param preconditioning: What the network predicts: "edm", "noise", or a function from alpha and sigma to coefficients
    :param denoiser_class: Network to use: "late_fusion", "mlp", or a subclass of :class:`~sb3_qsm.networks.Denoiser`
    :param denoiser_kwargs: Keyword arguments for ``denoiser_class``
    :param compile_sampling: Whether to compile the reverse chain with ``torch.compile``, which needs a C++ compiler on a CPU
        and takes up to a minute for each of the first few batch sizes; numbers agree with the plain chain's to rounding
    :raises ValueError: for a number of steps below 1, and for unknown names
    """

    action_space: spaces.Box
    c_skip: th.Tensor
    c_out: th.Tensor
    c_in: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: nn.Module,
        features_dim: int,
        normalize_images: bool = True,
        n_diffusion_steps: int = 6,
        beta_schedule: str | Callable[[int], th.Tensor] = "box",
        sampler: str | Callable[..., th.Tensor] = "ddpm",
        preconditioning: str | Callable[[th.Tensor, th.Tensor], Preconditioning] = "edm",
        denoiser_class: str | type[Denoiser] = "late_fusion",
        denoiser_kwargs: dict[str, Any] | None = None,
        compile_sampling: bool = False,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor=features_extractor,  # type: ignore[arg-type]
            normalize_images=normalize_images,
            squash_output=True,
        )
        if not isinstance(n_diffusion_steps, int) or isinstance(n_diffusion_steps, bool) or n_diffusion_steps < 1:
            raise ValueError(f"n_diffusion_steps must be an integer of at least 1, got {n_diffusion_steps!r}")
        self.net_arch = net_arch
        self.features_dim = features_dim
        self.diffusion_kwargs = dict(
            n_diffusion_steps=n_diffusion_steps,
            beta_schedule=beta_schedule,
            sampler=sampler,
            preconditioning=preconditioning,
            denoiser_class=denoiser_class,
            denoiser_kwargs=denoiser_kwargs,
            compile_sampling=compile_sampling,
        )
        self.action_dim = get_action_dim(action_space)
        self.sampler = lookup("sampler", sampler, SAMPLERS)
        self.noise_schedule = NoiseSchedule(lookup("beta_schedule", beta_schedule, BETA_SCHEDULES)(n_diffusion_steps))
        if self.noise_schedule.n_steps != n_diffusion_steps:
            raise ValueError(
                f"beta_schedule must return n_diffusion_steps={n_diffusion_steps} betas, got {self.noise_schedule.n_steps}"
            )
        coefficients = lookup("preconditioning", preconditioning, PRECONDITIONINGS)(
            self.noise_schedule.alpha, self.noise_schedule.sigma
        )
        for name, values in coefficients._asdict().items():
            self.register_buffer(name, values, persistent=False)
        # One by one for the chain, which would spend its time on indexing; tensors and floats as in NoiseSchedule.posterior
        c_skip, c_out, c_in = coefficients
        self.coefficients = list(zip(c_skip.unbind(), c_out.tolist(), c_in.unbind(), strict=True))
        network = lookup("denoiser_class", denoiser_class, DENOISERS)
        self.denoiser = network(features_dim, self.action_dim, n_diffusion_steps, net_arch, **(denoiser_kwargs or {}))
        if compile_sampling:
            self.sample = th.compile(self.sample)  # type: ignore[method-assign]

    def __getstate__(self) -> dict[str, Any]:
        # Compiled code stays behind: a copy samples plainly, a model that is loaded compiles again
        return {name: value for name, value in super().__getstate__().items() if name != "sample"}

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            net_arch=self.net_arch,
            features_dim=self.features_dim,
            features_extractor=self.features_extractor,
            **self.diffusion_kwargs,
        )
        return data

    def denoise(self, obs: PyTorchObs, noisy_actions: th.Tensor, t: th.Tensor) -> th.Tensor:
        """
        The clean actions that the network sees in noisy ones.

        :param obs: observations
        :param noisy_actions: scaled noisy actions, shape (B, A)
        :param t: level of each sample, shape (B,)
        :return: clean actions, not clipped, shape (B, A)
        """
        features = self.extract_features(obs, self.features_extractor)
        output = self.denoiser(features, self.c_in[t, None] * noisy_actions, t)
        return self.c_skip[t, None] * noisy_actions + self.c_out[t, None] * output

    def denoise_fn(self, obs: PyTorchObs) -> DenoiseFn:
        """
        :meth:`denoise` for one chain: the observations' share of the work is done once.

        :param obs: observations
        :return: (x_t of shape (B, A), level t) -> clean actions of shape (B, A)
        """
        predict = self.denoiser.condition(self.extract_features(obs, self.features_extractor))

        def denoise(x_t: th.Tensor, t: int) -> th.Tensor:
            c_skip, c_out, c_in = self.coefficients[t]
            return th.add(c_skip * x_t, predict(c_in * x_t, t), alpha=c_out)

        return denoise

    def sample(self, obs: PyTorchObs, noise: th.Tensor) -> th.Tensor:
        """
        Run the reverse chain with the noise given: a pure function of weights, observation and noise.

        :param obs: observations
        :param noise: start of the chain and noise of each step, standard normal, shape (1 + T, B, A)
        :return: scaled actions, shape (B, A)
        """
        return self.sampler(self.denoise_fn(obs), self.noise_schedule, noise[0], noise[1:])

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        Draw actions. Deterministic means no noise at all, from the start of the chain on: one typical action, which is
        neither the mean nor, with several modes, always the best.

        :param obs: observations
        :param deterministic: whether to leave out all noise
        :return: scaled actions, shape (B, A)
        """
        some = next(iter(obs.values())) if isinstance(obs, dict) else obs
        shape = (1 + self.noise_schedule.n_steps, len(some), self.action_dim)
        draw = th.zeros if deterministic else th.randn
        return self.sample(obs, draw(shape, device=some.device))

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self(observation, deterministic)


class LayerNorm(nn.LayerNorm):
    """
    Layer normalisation with gain ``1 + weight``: all weights start at zero, so that a target network's slow copy of them is
    told apart from the start (SB3's tests compare with a relative tolerance). Learns like the plain one.

    :param size: number of units
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        nn.init.zeros_(self.weight)

    def forward(self, input: th.Tensor) -> th.Tensor:
        return nn.functional.layer_norm(input, self.normalized_shape, 1 + self.weight, self.bias, self.eps)


class ScaledCritic(ContinuousCritic):
    """
    SB3's critics with layer normalisation before each activation, and values in units of ``scale``: what the networks learn
    does not depend on the unit of the rewards, and the critics answer in units of the return.

    :param layer_norm: whether each hidden layer is normalised
    :param kwargs: arguments of :class:`~stable_baselines3.common.policies.ContinuousCritic`, all by keyword
    """

    scale: th.Tensor

    def __init__(self, layer_norm: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("scale", th.ones(()))
        input_dim = kwargs["features_dim"] + get_action_dim(self.action_space)
        norm: list[type[nn.Module]] = [LayerNorm] if layer_norm else []
        self.q_networks = []
        for index in range(self.n_critics):
            layers = create_mlp(input_dim, 1, kwargs["net_arch"], kwargs["activation_fn"], post_linear_modules=norm)
            self.q_networks.append(nn.Sequential(*layers))
            setattr(self, f"qf{index}", self.q_networks[-1])

    def forward(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        return tuple(self.scale * q_value for q_value in super().forward(obs, actions))

    def q1_forward(self, obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return self.scale * super().q1_forward(obs, actions)


class DiffusionPolicy(BasePolicy):
    """
    Policy class (with both actor and critic) for QSM: ``online_actor`` learns, ``actor``, a running mean of its weights, acts.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param net_arch: The specification of the denoiser and value networks, a list or ``dict(pi=[...], qf=[...])``
    :param activation_fn: Activation function of the critics (the denoiser's is in ``denoiser_kwargs``)
    :param features_extractor_class: Features extractor to use.
    :param features_extractor_kwargs: Keyword arguments for the features extractor
    :param normalize_images: Whether to divide images by 255.0
    :param optimizer_class: The optimizer to use, ``th.optim.Adam`` by default
    :param optimizer_kwargs: Additional keyword arguments, excluding the learning rate, to pass to the optimizer;
        ``dict(fused=True)`` if left out for Adam
    :param n_critics: Number of critic networks to create.
    :param share_features_extractor: Whether to share the features extractor between the actor and the critic
    :param layer_norm: Whether the critics normalise each hidden layer
    :param diffusion_kwargs: ``n_diffusion_steps``, ``beta_schedule``, ``sampler``, ``preconditioning``, ``denoiser_class``,
        ``denoiser_kwargs``, ``compile_sampling``: see :class:`DiffusionActor`
    """

    actor: DiffusionActor
    online_actor: DiffusionActor
    critic: ScaledCritic
    critic_target: ScaledCritic
    exploring = False  # whether the actor that learns acts

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.Hardswish,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        share_features_extractor: bool = False,
        layer_norm: bool = True,
        **diffusion_kwargs: Any,
    ) -> None:
        if optimizer_kwargs is None and optimizer_class is th.optim.Adam:
            optimizer_kwargs = dict(fused=True)  # a third of the time of the loop over parameters, same result
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            features_extractor_kwargs,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=True,
            normalize_images=normalize_images,
        )
        if n_critics < 1:
            raise ValueError(f"n_critics must be at least 1, got {n_critics!r}")
        self.net_arch = [256, 256] if net_arch is None else net_arch
        actor_arch, critic_arch = get_actor_critic_arch(self.net_arch)
        net_args: dict[str, Any] = dict(
            observation_space=observation_space, action_space=action_space, normalize_images=normalize_images
        )
        self.diffusion_kwargs = diffusion_kwargs
        self.actor_kwargs = dict(net_args, net_arch=actor_arch, **diffusion_kwargs)
        self.critic_kwargs = dict(
            net_args,
            net_arch=critic_arch,
            activation_fn=activation_fn,
            n_critics=n_critics,
            share_features_extractor=share_features_extractor,
            layer_norm=layer_norm,
        )
        self._build(lr_schedule)

    def _build(self, lr_schedule: Schedule) -> None:
        self.online_actor = self.make_actor()
        shared = self.online_actor.features_extractor if self.critic_kwargs["share_features_extractor"] else None
        self.actor = self.make_actor(shared)
        self.critic = self.make_critic(shared)
        self.critic_target = self.make_critic()
        for network, slow_copy in ((self.online_actor, self.actor), (self.critic, self.critic_target)):
            slow_copy.load_state_dict(network.state_dict())
        self.train()

        # A shared features extractor learns from the actor's loss only
        critic_parameters = [
            parameter
            for name, parameter in self.critic.named_parameters()
            if shared is None or "features_extractor" not in name
        ]
        for network, parameters in ((self.online_actor, self.online_actor.parameters()), (self.critic, critic_parameters)):
            network.optimizer = self.optimizer_class(parameters, lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            net_arch=self.net_arch,
            activation_fn=self.critic_kwargs["activation_fn"],
            n_critics=self.critic_kwargs["n_critics"],
            share_features_extractor=self.critic_kwargs["share_features_extractor"],
            layer_norm=self.critic_kwargs["layer_norm"],
            lr_schedule=self._dummy_schedule,  # dummy lr schedule, not needed for loading policy alone
            optimizer_class=self.optimizer_class,
            optimizer_kwargs=self.optimizer_kwargs,
            features_extractor_class=self.features_extractor_class,
            features_extractor_kwargs=self.features_extractor_kwargs,
            **self.diffusion_kwargs,
        )
        return data

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> DiffusionActor:
        return DiffusionActor(**self._update_features_extractor(self.actor_kwargs, features_extractor)).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> ScaledCritic:
        return ScaledCritic(**self._update_features_extractor(self.critic_kwargs, features_extractor)).to(self.device)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._predict(obs, deterministic=deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return (self.online_actor if self.exploring else self.actor)(observation, deterministic)

    def train(self: SelfPolicy, mode: bool = True) -> SelfPolicy:
        """
        Put the policy in either training or evaluation mode; the slow copies always stay in evaluation mode.

        :param mode: if true, set to training mode, else set to evaluation mode
        :return: the policy
        """
        slow_copies, networks = (self.actor, self.critic_target), (self.online_actor, self.critic)
        # Otherwise a walk over all modules at each predict
        if [it.training for it in (self, *networks, *slow_copies)] != [mode, mode, mode, False, False]:
            self.training = mode
            for slow_copy in slow_copies:
                slow_copy.train(False)
            for network in networks:  # after the slow copies, with one of which they may share a features extractor
                network.train(mode)
        return self


MlpPolicy = DiffusionPolicy


class CnnPolicy(DiffusionPolicy):
    """:class:`DiffusionPolicy` for images: the default features extractor is :class:`NatureCNN`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", NatureCNN)
        super().__init__(*args, **kwargs)


class MultiInputPolicy(DiffusionPolicy):
    """:class:`DiffusionPolicy` for dictionaries: the default features extractor is :class:`CombinedExtractor`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", CombinedExtractor)
        super().__init__(*args, **kwargs)
