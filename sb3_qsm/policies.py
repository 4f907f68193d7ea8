"""
The diffusion policy in SB3's form: a denoising actor with a running mean of its weights, critics and their targets.

Legend: B batch, A action dimension, F features, T diffusion steps. Scaled actions are in [-1, 1].
"""

import copy
import operator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

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

from sb3_qsm.networks import DENOISERS, PRECONDITIONINGS, Denoiser
from sb3_qsm.representation import Representation
from sb3_qsm.samplers import SAMPLERS, DenoiseFn, Sampler
from sb3_qsm.schedules import SCHEDULES
from sb3_qsm.schedules import Schedule as NoiseSchedule


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

    It holds the weights that learn, which draw actions, and their running mean, which gives the deterministic action: a mean
    over some hundred updates is steadier than the last one. Both are in its state dict.

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: Units of each hidden layer of the denoiser
    :param features_extractor: Network to extract features
    :param features_dim: Number of features
    :param normalize_images: Whether to divide images by 255.0
    :param representation: the one that learns, if any; the denoiser looks through its slow copy
    :param n_diffusion_steps: Number of denoising steps T
    :param noise_schedule: Noise levels: "geometric", "cosine", "vp", or a function from T to ratios of shape (T,)
    :param sampler: Reverse chain: "ddpm", "ddim", or a function like :func:`~sb3_qsm.samplers.ddpm_sample`
    :param preconditioning: What the network predicts: "edm", "noise", or a function like
        :func:`~sb3_qsm.networks.edm_preconditioning`
    :param learn_variance: Whether the denoiser learns the variance of a clean action beside its mean, so that each step draws
        as widely as the policy it aims at; without it a chain takes its guesses for certain
    :param denoiser_class: Network to use: "late_fusion", "mlp", or a subclass of :class:`~sb3_qsm.networks.Denoiser`
    :param denoiser_kwargs: Keyword arguments for ``denoiser_class``
    :raises ValueError: for a number of steps below 1, for unknown names, and for ratios that do not rise from above 0
    """

    action_space: spaces.Box
    features_extractor: BaseFeaturesExtractor
    ratios: th.Tensor
    n_averaged: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        normalize_images: bool = True,
        representation: Representation | None = None,
        n_diffusion_steps: int = 6,
        noise_schedule: str | NoiseSchedule = "geometric",
        sampler: str | Sampler = "ddpm",
        preconditioning: Any = "edm",
        learn_variance: bool = False,
        denoiser_class: str | type[Denoiser] = "late_fusion",
        denoiser_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor=features_extractor,
            normalize_images=normalize_images,
            squash_output=True,
        )
        is_integer = hasattr(n_diffusion_steps, "__index__") and not isinstance(n_diffusion_steps, bool)
        if not is_integer or n_diffusion_steps < 1:
            raise ValueError(f"n_diffusion_steps must be an integer of at least 1, got {n_diffusion_steps!r}")
        n_diffusion_steps = operator.index(n_diffusion_steps)
        ratios: th.Tensor = lookup("noise_schedule", noise_schedule, SCHEDULES)(n_diffusion_steps)
        steps = ratios.diff(prepend=ratios.new_zeros(1)) if ratios.ndim == 1 else ratios.new_zeros(1)
        if len(ratios) != n_diffusion_steps or not bool(((steps > 0) & steps.isfinite()).all()):
            wanted = f"n_diffusion_steps={n_diffusion_steps} positive rising ratios"
            raise ValueError(f"noise_schedule must return {wanted}, got {ratios.tolist()}")
        self.net_arch = net_arch
        self.features_dim = features_dim
        self.diffusion_kwargs: dict[str, Any] = dict(
            n_diffusion_steps=n_diffusion_steps,
            noise_schedule=noise_schedule,
            sampler=sampler,
            preconditioning=preconditioning,
            learn_variance=learn_variance,
            denoiser_class=denoiser_class,
            denoiser_kwargs=denoiser_kwargs,
        )
        self.action_dim = get_action_dim(action_space)
        self.register_buffer("ratios", ratios.float(), persistent=False)
        self.sampler = lookup("sampler", sampler, SAMPLERS)
        self.preconditioning = lookup("preconditioning", preconditioning, PRECONDITIONINGS)
        if not isinstance(learn_variance, bool):
            raise ValueError(f"learn_variance must be True or False, got {learn_variance!r}")
        self.learn_variance = learn_variance
        # A batch looks its level up; a chain spends its time in dispatch, where python's floats are cheapest, but as factors
        self.levels: list[float] = self.ratios.tolist()
        self.start_std = (1 + self.ratios[-1] ** 2).sqrt()
        c_skip, c_out, c_in = (th.as_tensor(c).expand_as(self.ratios) for c in self.preconditioning(self.ratios))
        self.coefficients = list(zip(c_skip.unbind(), c_out.tolist(), c_in.unbind(), strict=True))
        self.representation = representation
        self.slow_representation = representation and copy.deepcopy(representation).requires_grad_(False).eval()
        inputs = features_dim + (representation.embedding_dim if representation else 0)
        network = lookup("denoiser_class", denoiser_class, DENOISERS)
        outputs = self.action_dim * (2 if learn_variance else 1)
        self.denoiser: Denoiser = network(
            inputs, self.action_dim, n_diffusion_steps, net_arch, outputs, **(denoiser_kwargs or {})
        )
        self.average = copy.deepcopy(nn.ModuleDict(self.networks())).requires_grad_(False).eval()
        self.register_buffer("n_averaged", th.zeros(()))

    def networks(self) -> dict[str, Any]:
        """
        :return: what learns from the actor's loss, by name
        """
        return {"features_extractor": self.features_extractor, "denoiser": self.denoiser}

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            net_arch=self.net_arch,
            features_dim=self.features_dim,
            features_extractor=self.features_extractor,
            representation=self.representation,
            **self.diffusion_kwargs,
        )
        return data

    def extract_features(self, obs: PyTorchObs, features_extractor: BaseFeaturesExtractor) -> th.Tensor:
        """
        :param obs: observations
        :param features_extractor: the one that learns, or its running mean
        :return: features, and what the representation adds, shape (B, F)
        """
        features = super().extract_features(obs, features_extractor)
        return features if self.slow_representation is None else self.slow_representation(obs, features)

    def remembering(self, *observations: PyTorchObs) -> AbstractContextManager[None]:
        """
        :param observations: each a batch of observations
        :return: block in which each is embedded once, see :meth:`~sb3_qsm.representation.Representation.remembering`
        """
        return nullcontext() if self.slow_representation is None else self.slow_representation.remembering(*observations)

    def denoise(self, obs: PyTorchObs, noisy_actions: th.Tensor, t: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        The clean actions that the network sees in noisy ones.

        :param obs: observations
        :param noisy_actions: scaled actions with noise, u = a_0 + r_t z, shape (B, A)
        :param t: level of each sample, shape (B,)
        :return: mean of the clean actions, not clipped, and their variance, which may still be negative, each of shape (B, A);
            without ``learn_variance`` the second has no columns
        """
        features = self.extract_features(obs, self.features_extractor)
        c_skip, c_out, c_in = self.preconditioning(self.ratios[t, None])
        outputs = self.denoiser(features, c_in * noisy_actions, t)
        mean, excess = outputs[:, : self.action_dim], outputs[:, self.action_dim :]
        return c_skip * noisy_actions + c_out * mean, c_out**2 * (1 + excess)

    def denoise_fn(self, obs: PyTorchObs, average: bool = False) -> DenoiseFn:
        """
        :meth:`denoise` for one chain: the observations' share of the work is done once, and no variance is negative.

        :param obs: observations
        :param average: whether to use the running mean of the weights
        :return: (u of shape (B, A), level t) -> mean of the clean actions and their variance, each of shape (B, A)
        """
        networks: Any = self.average if average else self.networks()
        predict = networks["denoiser"].condition(self.extract_features(obs, networks["features_extractor"]))
        coefficients, learn_variance = self.coefficients, self.learn_variance

        def denoise(u: th.Tensor, t: int) -> tuple[th.Tensor, th.Tensor | float]:
            c_skip, c_out, c_in = coefficients[t]
            outputs = predict(c_in * u, t)
            if not learn_variance:
                return (c_skip * u).add_(outputs, alpha=c_out), 0.0
            mean, excess = outputs.chunk(2, dim=1)
            return (c_skip * u).add_(mean, alpha=c_out), (1 + excess).clamp_(min=0).mul_(c_out**2)

        return denoise

    def sample(self, obs: PyTorchObs, noise: th.Tensor, average: bool = False) -> th.Tensor:
        """
        Run the reverse chain with the noise given: a pure function of weights, observation and noise.

        :param obs: observations
        :param noise: start of the chain and noise of each step, standard normal, shape (1 + T, B, A)
        :param average: whether to use the running mean of the weights
        :return: scaled actions, shape (B, A)
        """
        return self._chain(self.denoise_fn(obs, average), noise)

    def trajectory(self, obs: PyTorchObs, noise: th.Tensor, average: bool = False) -> th.Tensor:
        """
        What the chain of :meth:`sample` passes through, to be drawn.

        :param obs: observations
        :param noise: start of the chain and noise of each step, standard normal, shape (1 + T, B, A)
        :param average: whether to use the running mean of the weights
        :return: noisy actions u from the highest level down, and the actions they end in, shape (T + 1, B, A)
        """
        passed = []
        denoise = self.denoise_fn(obs, average)

        def noted(u: th.Tensor, t: int) -> tuple[th.Tensor, th.Tensor | float]:
            passed.append(u)
            return denoise(u, t)

        end = self._chain(noted, noise)
        return th.stack([*passed, end])

    def _chain(self, denoise: DenoiseFn, noise: th.Tensor) -> th.Tensor:
        start, *steps = noise.unbind()
        return self.sampler(denoise, self.levels, self.start_std * start, steps)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        Draw actions with the weights that learn. Deterministic means their running mean, once there is one, and no noise at
        all, from the start of the chain on: one typical action, which is neither the mean nor, with several modes, always the
        best.

        :param obs: observations
        :param deterministic: whether to leave out all noise
        :return: scaled actions, shape (B, A)
        """
        some = next(iter(obs.values())) if isinstance(obs, dict) else obs
        noise = self.ratios.new_zeros(1 + len(self.levels), len(some), self.action_dim)
        if deterministic:
            return self.sample(obs, noise, average=self.has_average())
        return self.sample(obs, noise.normal_())

    def has_average(self) -> bool:
        """
        :return: whether the weights have been averaged; until then those that were given or initialised answer
        """
        return self.n_averaged.item() > 0

    @th.no_grad()
    def update_average(self, decay: float) -> None:
        """
        Move the running mean towards the present weights, further at first, as in TensorFlow's moving averages: the mean of a
        short run is not to be its start. Statistics of batch normalisation are copied.

        :param decay: share of the mean that stays, in the long run
        """
        share = (9 / (10 + self.n_averaged)).clamp(min=1 - decay)
        for name, network in self.networks().items():
            for mean, weight in zip(self.average[name].parameters(), network.parameters(), strict=True):
                mean.lerp_(weight, share)
            for copied, statistic in zip(self.average[name].buffers(), network.buffers(), strict=True):
                copied.copy_(statistic)
        self.n_averaged += 1

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        with th.inference_mode():  # a tenth faster than no_grad, with which SB3 calls it, for a chain's many small tensors
            return self(observation, deterministic)

    def train(self, mode: bool = True) -> "DiffusionActor":
        """
        Put the networks that learn in either training or evaluation mode; slow copies always stay in evaluation mode.

        :param mode: if true, set to training mode, else set to evaluation mode
        :return: the actor
        """
        super().train(mode)
        self.average.eval()
        if self.slow_representation is not None:
            self.slow_representation.eval()
        return self


class LayerNorm(nn.LayerNorm):
    """
    Layer normalisation with gain ``1 + weight``: all weights start at zero, so that a target network's slow copy of them is
    told apart from the start (sb3-contrib's tests compare with a relative tolerance). Learns like the plain one.

    :param size: number of units
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        nn.init.zeros_(self.weight)

    def forward(self, input: th.Tensor) -> th.Tensor:
        return nn.functional.layer_norm(input, self.normalized_shape, 1 + self.weight, self.bias, self.eps)


class Critic(ContinuousCritic):
    """
    SB3's critics, which see the representation of state and action beside features and action.

    :param representation: slow representation, if any; it is the actor's, and no part of the critics
    :param layer_norm: whether each hidden layer is normalised before its activation
    :param kwargs: arguments of :class:`~stable_baselines3.common.policies.ContinuousCritic`, all by keyword
    """

    def __init__(self, representation: Representation | None, layer_norm: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shared = (representation,)  # in a tuple, a module is not registered
        input_dim = kwargs["features_dim"] + get_action_dim(self.action_space)
        input_dim += 2 * representation.embedding_dim if representation else 0
        norm: list[type[nn.Module]] = [LayerNorm] if layer_norm else []
        self.q_networks = []
        for index in range(self.n_critics):
            layers = create_mlp(input_dim, 1, kwargs["net_arch"], kwargs["activation_fn"], post_linear_modules=norm)
            self.q_networks.append(nn.Sequential(*layers))
            setattr(self, f"qf{index}", self.q_networks[-1])

    def _inputs(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        :param obs: observations
        :param actions: scaled actions, shape (B, A)
        :return: what each critic sees: features, z_s, actions and z_sa, shape (B, F + Z + A + Z)
        """
        (representation,) = self.shared
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor):
            features = self.extract_features(obs, self.features_extractor)
        if representation is None:
            return th.cat([features, actions], dim=1)
        features = representation(obs, features)
        pairs = representation.pair(features[:, -representation.embedding_dim :], actions)
        return th.cat([features, actions, pairs], dim=1)

    def forward(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        """
        :param obs: observations
        :param actions: scaled actions, shape (B, A)
        :return: value by each critic, shape (B, 1)
        """
        inputs = self._inputs(obs, actions)
        return tuple(q_network(inputs) for q_network in self.q_networks)

    def q1_forward(self, obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param obs: observations
        :param actions: scaled actions, shape (B, A)
        :return: value by the first critic, shape (B, 1)
        """
        return self.q_networks[0](self._inputs(obs, actions))


class DiffusionPolicy(BasePolicy):
    """
    Policy class (with both actor and critic) for QSM.

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
    :param embedding_dim: Units of the embeddings that critics and denoiser see beside the features, see
        :class:`~sb3_qsm.representation.Representation`; None for none
    :param diffusion_kwargs: ``n_diffusion_steps``, ``noise_schedule``, ``sampler``, ``preconditioning``, ``learn_variance``,
        ``denoiser_class``, ``denoiser_kwargs``: see :class:`DiffusionActor`
    :raises ValueError: for an argument out of its range; the message names the argument, its value and the range
    """

    actor_class: ClassVar[type[DiffusionActor]] = DiffusionActor
    actor: DiffusionActor
    critic: Critic
    critic_target: Critic

    def __init__(
        self,
        observation_space: spaces.Space[Any],
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
        layer_norm: bool = False,
        embedding_dim: int | None = 128,
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
        if not hasattr(n_critics, "__index__") or n_critics < 1:
            raise ValueError(f"n_critics must be an integer of at least 1, got {n_critics!r}")
        if embedding_dim is not None and (type(embedding_dim) is not int or embedding_dim < 1):
            raise ValueError(f"embedding_dim must be None or an integer of at least 1, got {embedding_dim!r}")
        self.net_arch = dict(pi=[256, 256], qf=[128, 128]) if net_arch is None else net_arch
        self.embedding_dim = embedding_dim
        self.share_features_extractor = share_features_extractor
        actor_arch, critic_arch = get_actor_critic_arch(self.net_arch)
        self.net_args = dict(observation_space=observation_space, action_space=action_space, normalize_images=normalize_images)
        self.diffusion_kwargs = diffusion_kwargs
        self.actor_kwargs = dict(self.net_args, net_arch=actor_arch, **diffusion_kwargs)
        self.critic_kwargs = dict(
            self.net_args,
            net_arch=critic_arch,
            activation_fn=activation_fn,
            n_critics=n_critics,
            share_features_extractor=share_features_extractor,
            layer_norm=layer_norm,
        )
        self._build(lr_schedule)

    def _build(self, lr_schedule: Schedule) -> None:
        self.actor = self.make_actor()
        self.critic = self.make_critic(self.actor.features_extractor if self.share_features_extractor else None)
        self.critic_target = self.make_critic()
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.critic_target.set_training_mode(False)

        # A shared features extractor learns from the actor's loss only
        critic_parameters = [
            parameter
            for name, parameter in self.critic.named_parameters()
            if not (self.share_features_extractor and "features_extractor" in name)
        ]
        actor_parameters = [p for network in self.actor.networks().values() for p in network.parameters()]
        learning: list[tuple[Any, Any]] = [(self.actor, actor_parameters), (self.critic, critic_parameters)]
        if (representation := self.actor.representation) is not None:
            learning.append((representation, representation.parameters()))
        for network, parameters in learning:
            network.optimizer = self.optimizer_class(parameters, lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            net_arch=self.net_arch,
            activation_fn=self.critic_kwargs["activation_fn"],
            n_critics=self.critic_kwargs["n_critics"],
            share_features_extractor=self.share_features_extractor,
            layer_norm=self.critic_kwargs["layer_norm"],
            embedding_dim=self.embedding_dim,
            lr_schedule=self._dummy_schedule,  # dummy lr schedule, not needed for loading policy alone
            optimizer_class=self.optimizer_class,
            optimizer_kwargs=self.optimizer_kwargs,
            features_extractor_class=self.features_extractor_class,
            features_extractor_kwargs=self.features_extractor_kwargs,
            **self.diffusion_kwargs,
        )
        return data

    def make_representation(self) -> Representation | None:
        """
        :return: a new representation, if ``embedding_dim`` asks for one
        """
        if self.embedding_dim is None:
            return None
        kwargs = dict(self.net_args, embedding_dim=self.embedding_dim)
        return Representation(**self._update_features_extractor(kwargs)).to(self.device)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> DiffusionActor:
        kwargs = dict(self.actor_kwargs, representation=self.make_representation())
        return self.actor_class(**self._update_features_extractor(kwargs, features_extractor)).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> Critic:
        kwargs = dict(self.critic_kwargs, representation=self.actor.slow_representation)
        return Critic(**self._update_features_extractor(kwargs, features_extractor)).to(self.device)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.actor(obs, deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.actor._predict(observation, deterministic)

    def set_training_mode(self, mode: bool) -> None:
        """
        Put the policy in either training or evaluation mode, but for the target critics and the actor's mean.

        :param mode: if true, set to training mode, else set to evaluation mode
        """
        if not (self.training == self.actor.training == self.critic.training == mode):  # else a walk over all modules
            self.actor.set_training_mode(mode)
            self.critic.set_training_mode(mode)
            self.training = mode


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
