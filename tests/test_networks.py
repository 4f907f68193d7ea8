"""Denoisers and preconditioning: identities that hold for any weights."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from sb3_qsm.networks import (
    DENOISERS,
    PRECONDITIONINGS,
    Denoiser,
    FourierFeatures,
    LateFusionDenoiser,
    MLPDenoiser,
    edm_preconditioning,
    noise_preconditioning,
)
from sb3_qsm.policies import DiffusionActor
from sb3_qsm.schedules import NoiseSchedule, box_betas

F, A, T, B = 5, 3, 4, 7


def make_actor(**kwargs):
    observation_space = spaces.Box(-1, 1, (F,), np.float32)
    extractor = FlattenExtractor(observation_space)
    return DiffusionActor(observation_space, spaces.Box(-1, 1, (A,), np.float32), [8], extractor, F, **kwargs)


def test_fourier_features_by_hand():
    features = FourierFeatures(4)
    features.frequencies.data = th.tensor([0.25, 0.5])
    # Phases 2 pi t w: none at t = 0, a quarter and a half turn at t = 1
    np.testing.assert_allclose(features(th.tensor([0.0, 1.0])).detach(), [[1, 1, 0, 0], [0, -1, 1, 0]], atol=1e-6)


@pytest.mark.parametrize("denoiser_class", DENOISERS.values())
@pytest.mark.parametrize("net_arch", [[], [16], [16, 8], [16, 8, 4]])
def test_condition_equals_forward(net_arch, denoiser_class):
    denoiser = denoiser_class(F, A, T, net_arch)
    features, noisy_actions, t = th.randn(B, F), th.randn(B, A), th.tensor([0, 1, 2, 3, 3, 0, 2])
    whole = denoiser(features, noisy_actions, t)
    assert whole.shape == (B, A)
    predict = denoiser.condition(features)
    for level in range(T):  # a chain gives the level as an integer
        rows = t == level
        for all_rows in (predict(noisy_actions, level), denoiser(features, noisy_actions, level)):
            np.testing.assert_allclose(all_rows[rows].detach(), whole[rows].detach(), atol=1e-6)


@pytest.mark.parametrize("net_arch", [[], [16, 8]])
def test_is_an_mlp_on_the_concatenation(net_arch):
    denoiser = MLPDenoiser(F, A, T, net_arch, activation_fn=nn.Mish, time_dim=6, time_net_arch=(10, 4))
    features, noisy_actions, t = th.randn(B, F), th.randn(B, A), th.arange(B) % T
    inputs = th.cat([noisy_actions, features, denoiser.time_net(t.float())], dim=1)
    expected = denoiser.layers(denoiser.input_layer(inputs))
    np.testing.assert_allclose(denoiser(features, noisy_actions, t).detach(), expected.detach(), atol=1e-5)
    kinds = [type(layer) for layer in denoiser.layers]
    assert kinds == ([nn.Mish, nn.Linear, nn.Mish, nn.Linear] if net_arch else [])
    assert [type(layer) for layer in denoiser.time_net] == [FourierFeatures, nn.Linear, nn.Mish, nn.Linear]


@pytest.mark.parametrize("net_arch", [[], [16], [16, 8, 4]])
def test_late_fusion_joins_the_action_at_the_second_layer(net_arch):
    """Up to there it is a network of the features alone: W2 relu(W1 f + b1) + b2 + U a + v_t, then relu and the rest."""
    denoiser = LateFusionDenoiser(F, A, T, net_arch)
    features, noisy_actions, t = th.randn(B, F), th.randn(B, A), th.arange(B) % T
    linear = [layer for layer in denoiser.encoder if isinstance(layer, nn.Linear)]
    hidden = features
    for i, layer in enumerate(linear):
        hidden = (hidden.relu() if i else hidden) @ layer.weight.T + layer.bias
    assert len(linear) == min(2, len(net_arch))
    hidden = hidden + noisy_actions @ denoiser.action_layer.weight.T + denoiser.levels[t]
    for layer in (layer for layer in denoiser.head if isinstance(layer, nn.Linear)):
        hidden = hidden.relu() @ layer.weight.T + layer.bias
    np.testing.assert_allclose(denoiser(features, noisy_actions, t).detach(), hidden.detach(), atol=1e-5)


def test_late_fusion_looks_at_the_observation_once_per_chain():
    actor = make_actor(n_diffusion_steps=T, denoiser_class="late_fusion")
    calls = []
    actor.denoiser.encoder.register_forward_hook(lambda *args: calls.append(args))
    actor(th.rand(B, F))
    assert len(calls) == 1


@pytest.mark.parametrize("denoiser_class", DENOISERS.values())
def test_every_weight_learns(denoiser_class):
    th.manual_seed(0)
    denoiser = denoiser_class(F, A, T, [16, 8])
    denoiser(th.randn(B, F), th.randn(B, A), th.arange(B) % T).square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in denoiser.parameters())


def test_base_class():
    class Sum(Denoiser):
        def forward(self, features, noisy_actions, t):
            return noisy_actions + features[:, :A] + t

    denoiser = Sum(F, A, T, [])
    features, noisy_actions = th.randn(B, F), th.randn(B, A)
    assert th.equal(denoiser.condition(features)(noisy_actions, 2), noisy_actions + features[:, :A] + 2)
    with pytest.raises(NotImplementedError):
        Denoiser(F, A, T, [])(features, noisy_actions, 0)


def test_noise_preconditioning():
    """a_0 = (a_t - sigma F) / alpha: the network's output is the noise."""
    schedule = NoiseSchedule(box_betas(T))
    skip, out, scale_in = noise_preconditioning(schedule.alpha, schedule.sigma)
    noisy_actions, output = th.randn(T), th.randn(T)
    clean = skip * noisy_actions + out * output
    np.testing.assert_allclose(clean, (noisy_actions - schedule.sigma * output) / schedule.alpha, rtol=1e-5, atol=1e-6)
    assert th.equal(scale_in, th.ones(T))


def test_edm_preconditioning_by_hand():
    # alpha = sigma / r: r = 0.8 with alpha 0.5, sigma 0.4; s^2 + r^2 = 0.36 + 0.64 = 1 for s = 0.6
    c = edm_preconditioning(th.tensor([0.5]), th.tensor([0.4]))
    np.testing.assert_allclose(th.cat(c), [0.36 / 0.5, 0.8 * 0.6, 1 / 0.5], rtol=1e-6)


def test_edm_preconditioning_laws():
    """For actions of spread s: inputs and targets of the network have unit variance, and c_skip is the best linear guess."""
    schedule = NoiseSchedule(box_betas(T))
    alpha, sigma, std = schedule.alpha, schedule.sigma, 0.3
    skip, out, scale_in = edm_preconditioning(alpha, sigma, std)
    np.testing.assert_allclose(scale_in**2 * (alpha**2 * std**2 + sigma**2), 1, rtol=1e-5)
    np.testing.assert_allclose(((1 - skip * alpha) ** 2 * std**2 + skip**2 * sigma**2) / out**2, 1, rtol=1e-4)
    np.testing.assert_allclose(skip, alpha * std**2 / (alpha**2 * std**2 + sigma**2), rtol=1e-5)


@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS)
def test_chain_and_batch_denoise_alike(preconditioning):
    actor = make_actor(n_diffusion_steps=T, preconditioning=preconditioning)
    obs, noisy_actions = th.rand(B, F), th.randn(B, A)
    denoise = actor.denoise_fn(obs)
    for t in range(T):
        expected = actor.denoise(obs, noisy_actions, th.full((B,), t))
        np.testing.assert_allclose(denoise(noisy_actions, t).detach(), expected.detach(), atol=1e-5)


@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS)
def test_denoise_applies_the_preconditioning(preconditioning):
    actor = make_actor(n_diffusion_steps=T, preconditioning=preconditioning)
    obs, noisy_actions, t = th.rand(B, F), th.randn(B, A), th.arange(B) % T
    schedule = actor.noise_schedule
    skip, out, scale_in = (c[t, None] for c in PRECONDITIONINGS[preconditioning](schedule.alpha, schedule.sigma))
    expected = skip * noisy_actions + out * actor.denoiser(obs, scale_in * noisy_actions, t)
    np.testing.assert_allclose(actor.denoise(obs, noisy_actions, t).detach(), expected.detach(), atol=1e-6)


def test_sample_reads_noise_by_level():
    """The first slice starts the chain; slice 1 + t is the noise of level t, which the authors' chain adds for t > 0."""
    actor = make_actor(n_diffusion_steps=2, sampler="running_clip", preconditioning="noise", beta_schedule="vp")
    for parameter in actor.denoiser.parameters():
        parameter.data.zero_()
    noise = th.tensor([0.01, 7.0, 0.02])[:, None, None].expand(3, 1, A)
    betas = actor.noise_schedule.betas
    # The predicted noise is 0: x is divided by sqrt(1 - beta) at each step, and sqrt(beta_1) * 0.02 joins in between
    expected = (0.01 / (1 - betas[1]).sqrt() + betas[1].sqrt() * 0.02) / (1 - betas[0]).sqrt()
    np.testing.assert_allclose(actor.sample(th.zeros(1, F), noise).detach(), expected.expand(1, A), rtol=1e-5)
