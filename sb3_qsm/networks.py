"""
Denoisers: networks that see an observation's features, a noisy action and its noise level.

Legend: B batch, A action dimension, F features, T diffusion steps. Level t runs from 0 (least noise) to T - 1.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch as th
from torch import nn

PredictFn = Callable[[th.Tensor, int], th.Tensor]


class FourierFeatures(nn.Module):
    """
    Learned Fourier features of the level, cos(2 pi t w) and sin(2 pi t w), as in the QSM authors' network.

    :param n_features: number of features, even
    """

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(0.2 * th.randn(n_features // 2))

    def forward(self, t: th.Tensor) -> th.Tensor:
        """
        :param t: levels, shape (T,)
        :return: features, shape (T, n_features)
        """
        phase = 2 * math.pi * t[:, None] * self.frequencies
        return th.cat([phase.cos(), phase.sin()], dim=1)


class Denoiser(nn.Module):
    """
    Base class: override ``forward``, and ``condition`` where work can be shared by the steps of a chain.

    :param features_dim: number of features F of an observation
    :param action_dim: number of action dimensions A
    :param n_diffusion_steps: number of levels T
    :param net_arch: units of each hidden layer
    """

    def __init__(self, features_dim: int, action_dim: int, n_diffusion_steps: int, net_arch: list[int]) -> None:
        super().__init__()

    def forward(self, features: th.Tensor, noisy_actions: th.Tensor, t: int | th.Tensor) -> th.Tensor:
        """
        :param features: features of the observations, shape (B, F)
        :param noisy_actions: actions to denoise, scaled to about unit variance, shape (B, A)
        :param t: level of all samples (an integer), or of each sample, shape (B,)
        :return: network output, shape (B, A); what it stands for is set by the preconditioning
        """
        raise NotImplementedError

    def condition(self, features: th.Tensor) -> PredictFn:
        """
        :param features: features of the observations, shape (B, F)
        :return: ``forward`` with the features given: (noisy_actions, t) -> output, with ``t`` an integer
        """
        return partial(self, features)


class LateFusionDenoiser(Denoiser):
    """
    Multi-layer perceptron whose second hidden layer is the first to see the noisy action and its level, as DDPG's critic does
    with the action (Lillicrap et al., 2016, arXiv:1509.02971, section 7).

    What depends on the observation alone is computed once per chain, so that a further step costs only the layers behind it.

    :param features_dim: number of features F of an observation
    :param action_dim: number of action dimensions A
    :param n_diffusion_steps: number of levels T
    :param net_arch: units of each hidden layer; with fewer than two, the action joins at the last layer
    :param activation_fn: activation function
    """

    def __init__(
        self,
        features_dim: int,
        action_dim: int,
        n_diffusion_steps: int,
        net_arch: list[int],
        activation_fn: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__(features_dim, action_dim, n_diffusion_steps, net_arch)
        sizes = [features_dim, *net_arch]
        joined = sizes[:3][-1]
        self.encoder = nn.Sequential(*_mlp(sizes[:3], activation_fn))
        self.action_layer = nn.Linear(action_dim, joined, bias=False)
        self.levels = nn.Parameter(0.5 * th.randn(n_diffusion_steps, joined))
        self.head = nn.Sequential(activation_fn(), *_mlp([joined, *sizes[3:], action_dim], activation_fn))

    def forward(self, features: th.Tensor, noisy_actions: th.Tensor, t: int | th.Tensor) -> th.Tensor:
        return self.head(self.encoder(features) + self.levels[t] + self.action_layer(noisy_actions))

    def condition(self, features: th.Tensor) -> PredictFn:
        encoded = (self.encoder(features) + self.levels[:, None]).unbind()
        of_action, head = self.action_layer.weight.T, _without_modules(self.head)
        return lambda noisy_actions, t: head(th.addmm(encoded[t], noisy_actions, of_action))


class MLPDenoiser(Denoiser):
    """
    Multi-layer perceptron on [noisy action, features, time features].

    The first layer is linear in each of the three, so that the features' share is computed once per chain and the time
    features once per level.

    :param features_dim: number of features F of an observation
    :param action_dim: number of action dimensions A
    :param n_diffusion_steps: number of levels T
    :param net_arch: units of each hidden layer
    :param activation_fn: activation function
    :param time_dim: number of Fourier features of the level
    :param time_net_arch: units of each layer of the network on the Fourier features
    """

    levels: th.Tensor

    def __init__(
        self,
        features_dim: int,
        action_dim: int,
        n_diffusion_steps: int,
        net_arch: list[int],
        activation_fn: type[nn.Module] = nn.ReLU,
        time_dim: int = 64,
        time_net_arch: tuple[int, ...] = (128, 128),
    ) -> None:
        super().__init__(features_dim, action_dim, n_diffusion_steps, net_arch)
        self.register_buffer("levels", th.arange(n_diffusion_steps, dtype=th.float32), persistent=False)
        self.time_net = nn.Sequential(FourierFeatures(time_dim), *_mlp([time_dim, *time_net_arch], activation_fn))
        self.split = [action_dim, features_dim, time_net_arch[-1]]
        first, *rest = [*net_arch, action_dim]
        self.input_layer = nn.Linear(sum(self.split), first)
        hidden = [activation_fn(), *_mlp([first, *rest], activation_fn)] if rest else []
        self.layers = nn.Sequential(*hidden)

    def forward(self, features: th.Tensor, noisy_actions: th.Tensor, t: int | th.Tensor) -> th.Tensor:
        time_features = self.time_net(self.levels)[t].expand(len(features), -1)
        return self.layers(self.input_layer(th.cat([noisy_actions, features, time_features], dim=1)))

    def condition(self, features: th.Tensor) -> PredictFn:
        of_action, of_features, of_time = self.input_layer.weight.split(self.split, dim=1)
        shared = nn.functional.linear(features, of_features, self.input_layer.bias)
        levels = nn.functional.linear(self.time_net(self.levels), of_time)
        of_action, layers = of_action.T, _without_modules(self.layers)
        return lambda noisy_actions, t: layers(th.addmm(shared + levels[t], noisy_actions, of_action))


def _mlp(sizes: list[int], activation_fn: type[nn.Module]) -> list[nn.Module]:
    """Linear layers from sizes[0] to sizes[-1] with activations in between."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), activation_fn()]
    return layers[:-1]


def _without_modules(layers: nn.Sequential) -> Callable[[th.Tensor], th.Tensor]:
    """The same function of the present weights, for a chain's many small steps: module calls are a fifth of its time."""
    functions = [
        partial(th.addmm, layer.bias, mat2=layer.weight.T) if isinstance(layer, nn.Linear) else layer.forward
        for layer in layers
    ]

    def run(x: th.Tensor) -> th.Tensor:
        for function in functions:
            x = function(x)
        return x

    return run


DENOISERS: dict[str, type[Denoiser]] = {"late_fusion": LateFusionDenoiser, "mlp": MLPDenoiser}


class Preconditioning(NamedTuple):
    """
    How a network output F becomes a clean action: skip * a_t + out * F(in * a_t), each of shape (T,).

    Named as in Karras et al. (2022), arXiv:2206.00364, Eq. 7.
    """

    c_skip: th.Tensor
    c_out: th.Tensor
    c_in: th.Tensor


def noise_preconditioning(alpha: th.Tensor, sigma: th.Tensor) -> Preconditioning:
    """
    The network predicts the noise: a_0 = (a_t - sigma F(a_t)) / alpha.

    :param alpha: share of the action that is left at each level, shape (T,)
    :param sigma: standard deviation of the noise at each level, shape (T,)
    :return: coefficients
    """
    return Preconditioning(1 / alpha, -sigma / alpha, th.ones_like(alpha))


def edm_preconditioning(alpha: th.Tensor, sigma: th.Tensor, data_std: float = 0.6) -> Preconditioning:
    """
    The network predicts what is missing from the best linear guess (Karras et al., 2022, Table 1, for a_t / alpha).

    :param alpha: share of the action that is left at each level, shape (T,)
    :param sigma: standard deviation of the noise at each level, shape (T,)
    :param data_std: spread of clean actions; 0.577 would be uniform on [-1, 1]
    :return: coefficients
    """
    ratio = sigma / alpha
    total = (ratio**2 + data_std**2).sqrt()
    return Preconditioning((data_std / total) ** 2 / alpha, ratio * data_std / total, 1 / (alpha * total))


PRECONDITIONINGS = {"edm": edm_preconditioning, "noise": noise_preconditioning}
