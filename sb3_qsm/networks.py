"""
Denoisers: networks that see an observation's features, a noisy action and its noise level.

Legend: B batch, A action dimension, F features, T diffusion steps. Level t runs from 0 (least noise) to T - 1.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

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
    :param output_dim: number of outputs: 2 A where the variance is learnt beside the mean, A otherwise
    """

    def __init__(
        self, features_dim: int, action_dim: int, n_diffusion_steps: int, net_arch: list[int], output_dim: int
    ) -> None:
        super().__init__()

    def forward(self, features: th.Tensor, noisy_actions: th.Tensor, t: int | th.Tensor) -> th.Tensor:
        """
        :param features: features of the observations, shape (B, F)
        :param noisy_actions: actions to denoise, scaled to about unit variance, shape (B, A)
        :param t: level of all samples (an integer), or of each sample, shape (B,)
        :return: network output, shape (B, output_dim): first what the preconditioning makes a mean of, then the excess of the
            variance over the best linear guess's, in units of that
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
    :param output_dim: number of outputs
    :param activation_fn: activation function
    """

    def __init__(
        self,
        features_dim: int,
        action_dim: int,
        n_diffusion_steps: int,
        net_arch: list[int],
        output_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__(features_dim, action_dim, n_diffusion_steps, net_arch, output_dim)
        sizes = [features_dim, *net_arch]
        joined = sizes[:3][-1]
        self.encoder = nn.Sequential(*mlp(sizes[:3], activation_fn))
        self.action_layer = nn.Linear(action_dim, joined)
        nn.init.zeros_(self.action_layer.bias)  # the levels have one each
        self.levels = nn.Parameter(0.5 * th.randn(n_diffusion_steps, joined))
        self.head = nn.ModuleList([activation_fn(), *mlp([joined, *sizes[3:], output_dim], activation_fn)])

    def forward(self, features: th.Tensor, noisy_actions: th.Tensor, t: int | th.Tensor) -> th.Tensor:
        hidden = self.action_layer(noisy_actions) + (self.encoder(features) + self.levels[t])
        for layer in self.head:
            hidden = layer(hidden)
        return hidden

    def condition(self, features: th.Tensor) -> PredictFn:
        encoded = (self.encoder(features) + self.levels.unsqueeze(1)).unbind()
        action_layer, head = self.action_layer, list(self.head)  # looked up once: a step of a chain is all overhead

        def predict(noisy_actions: th.Tensor, t: int) -> th.Tensor:
            hidden = action_layer(noisy_actions) + encoded[t]
            for layer in head:
                hidden = layer(hidden)
            return hidden

        return predict


class MLPDenoiser(Denoiser):
    """
    Multi-layer perceptron on [noisy action, features, time features], as in the QSM authors' network.

    :param features_dim: number of features F of an observation
    :param action_dim: number of action dimensions A
    :param n_diffusion_steps: number of levels T
    :param net_arch: units of each hidden layer
    :param output_dim: number of outputs
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
        output_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        time_dim: int = 64,
        time_net_arch: tuple[int, ...] = (128, 128),
    ) -> None:
        super().__init__(features_dim, action_dim, n_diffusion_steps, net_arch, output_dim)
        self.register_buffer("levels", th.arange(n_diffusion_steps, dtype=th.float32), persistent=False)
        self.time_net = nn.Sequential(FourierFeatures(time_dim), *mlp([time_dim, *time_net_arch], activation_fn))
        inputs = action_dim + features_dim + time_net_arch[-1]
        self.layers = nn.Sequential(*mlp([inputs, *net_arch, output_dim], activation_fn))

    def forward(self, features: th.Tensor, noisy_actions: th.Tensor, t: int | th.Tensor) -> th.Tensor:
        time_features = self.time_net(self.levels)[t].expand(features.shape[0], -1)
        return self.layers(th.cat([noisy_actions, features, time_features], dim=1))


def mlp(sizes: list[int], activation_fn: type[nn.Module]) -> list[nn.Module]:
    """
    :param sizes: units of the input and of each layer
    :param activation_fn: activation between the layers
    :return: linear layers with activations in between
    """
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), activation_fn()]
    return layers[:-1]


DENOISERS: dict[str, type[Denoiser]] = {"late_fusion": LateFusionDenoiser, "mlp": MLPDenoiser}


class Preconditioning(NamedTuple):
    """
    How a network output F becomes a clean action: a_0 = c_skip u + c_out F(c_in u).

    Named as in Karras et al. (2022), arXiv:2206.00364, Eq. 7. Each is of the ratio's kind: a float, or a tensor of its shape.
    """

    c_skip: Any
    c_out: Any
    c_in: Any


def noise_preconditioning(ratio: Any) -> Preconditioning:
    """
    The network predicts the noise, from the variance-preserving u / sqrt(1 + r^2): a_0 = u - r F.

    :param ratio: noise-to-signal ratio r, a float or a tensor of any shape
    :return: coefficients
    """
    return Preconditioning(1.0, -ratio, (1 + ratio**2) ** -0.5)


def edm_preconditioning(ratio: Any, data_std: float = 0.6) -> Preconditioning:
    """
    The network predicts what is missing from the best linear guess (Karras et al., 2022, Table 1).

    :param ratio: noise-to-signal ratio r, a float or a tensor of any shape
    :param data_std: spread of clean actions; 0.577 would be uniform on [-1, 1]
    :return: coefficients
    """
    total = (ratio**2 + data_std**2) ** 0.5
    return Preconditioning((data_std / total) ** 2, ratio * data_std / total, 1 / total)


PRECONDITIONINGS: dict[str, Callable[[Any], Preconditioning]] = {"edm": edm_preconditioning, "noise": noise_preconditioning}
