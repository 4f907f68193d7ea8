"""Denoisers and preconditioning: identities that hold for any weights."""

import math

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
from sb3_qsm.schedules import geometric_ratios

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
    denoiser = denoiser_class(F, A, T, net_arch, 2 * A)
    features, noisy_actions, t = th.randn(B, F), th.randn(B, A), th.tensor([0, 1, 2, 3, 3, 0, 2])
    whole = denoiser(features, noisy_actions, t)
    assert whole.shape == (B, 2 * A)
    predict = denoiser.condition(features)
    for level in range(T):  # a chain gives the level as an integer
        rows = t == level
        for all_rows in (predict(noisy_actions, level), denoiser(features, noisy_actions, level)):
            np.testing.assert_allclose(all_rows[rows].detach(), whole[rows].detach(), atol=1e-6)


@pytest.mark.parametrize("net_arch", [[], [16, 8]])
def test_is_an_mlp_on_the_concatenation(net_arch):
    denoiser = MLPDenoiser(F, A, T, net_arch, A, activation_fn=nn.Mish, time_dim=6, time_net_arch=(10, 4))
    features, noisy_actions, t = th.randn(B, F), th.randn(B, A), th.arange(B) % T
    inputs = th.cat([noisy_actions, features, denoiser.time_net(t.float())], dim=1)
    np.testing.assert_allclose(denoiser(features, noisy_actions, t).detach(), denoiser.layers(inputs).detach(), atol=1e-5)
    kinds = [type(layer) for layer in denoiser.layers]
    assert kinds == [nn.Linear, nn.Mish] * len(net_arch) + [nn.Linear]
    assert [type(layer) for layer in denoiser.time_net] == [FourierFeatures, nn.Linear, nn.Mish, nn.Linear]


@pytest.mark.parametrize("net_arch", [[], [16], [16, 8, 4]])
def test_late_fusion_joins_the_action_at_the_second_layer(net_arch):
    """Up to there it is a network of the features alone: W2 relu(W1 f + b1) + b2 + U a + c + v_t, then relu and the rest."""
    denoiser = LateFusionDenoiser(F, A, T, net_arch, A)
    features, noisy_actions, t = th.randn(B, F), th.randn(B, A), th.arange(B) % T
    linear = [layer for layer in denoiser.encoder if isinstance(layer, nn.Linear)]
    hidden = features
    for i, layer in enumerate(linear):
        hidden = (hidden.relu() if i else hidden) @ layer.weight.T + layer.bias
    assert len(linear) == min(2, len(net_arch))
    action_layer = denoiser.action_layer
    hidden = hidden + noisy_actions @ action_layer.weight.T + action_layer.bias + denoiser.levels[t]
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
    denoiser = denoiser_class(F, A, T, [16, 8], 2 * A)
    denoiser(th.randn(B, F), th.randn(B, A), th.arange(B) % T).square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in denoiser.parameters())


def test_base_class():
    class Sum(Denoiser):
        def forward(self, features, noisy_actions, t):
            return noisy_actions + features[:, :A] + t

    denoiser = Sum(F, A, T, [], A)
    features, noisy_actions = th.randn(B, F), th.randn(B, A)
    assert th.equal(denoiser.condition(features)(noisy_actions, 2), noisy_actions + features[:, :A] + 2)
    with pytest.raises(NotImplementedError):
        Denoiser(F, A, T, [], A)(features, noisy_actions, 0)


def test_noise_preconditioning():
    """The network's output is the noise of u = a_0 + r z, its input the variance-preserving u / sqrt(1 + r^2)."""
    skip, out, scale_in = noise_preconditioning(th.tensor([0.75]))
    assert (skip * 2.0 + out * 3.0).item() == pytest.approx(2 - 0.75 * 3)
    assert scale_in.item() == pytest.approx(0.8)


def test_edm_preconditioning_by_hand():
    # r = 0.8: s^2 + r^2 = 0.36 + 0.64 = 1 for s = 0.6; of a number as of a tensor
    for ratio in (0.8, th.tensor(0.8)):
        assert [float(c) for c in edm_preconditioning(ratio)] == pytest.approx([0.36, 0.48, 1.0])


def test_edm_preconditioning_laws():
    """For actions of spread s: inputs and targets of the network have unit variance, and c_skip is the best linear guess."""
    ratios, std = geometric_ratios(T), 0.3
    skip, out, scale_in = edm_preconditioning(ratios, std)
    np.testing.assert_allclose(scale_in**2 * (std**2 + ratios**2), 1, rtol=1e-5)
    np.testing.assert_allclose(((1 - skip) ** 2 * std**2 + skip**2 * ratios**2) / out**2, 1, rtol=1e-4)
    np.testing.assert_allclose(skip, std**2 / (std**2 + ratios**2), rtol=1e-5)


@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS)
def test_chain_and_batch_denoise_alike(preconditioning):
    actor = make_actor(n_diffusion_steps=T, preconditioning=preconditioning, learn_variance=True)
    obs, noisy_actions = th.rand(B, F), th.randn(B, A)
    denoise = actor.denoise_fn(obs)
    for t in range(T):
        mean, variance = actor.denoise(obs, noisy_actions, th.full((B,), t))
        of_chain = denoise(noisy_actions, t)
        np.testing.assert_allclose(of_chain[0].detach(), mean.detach(), atol=1e-5)
        np.testing.assert_allclose(of_chain[1].detach(), variance.detach().clamp(min=0), atol=1e-5)


@pytest.mark.parametrize("preconditioning", PRECONDITIONINGS)
def test_denoise_applies_the_preconditioning(preconditioning):
    actor = make_actor(n_diffusion_steps=T, preconditioning=preconditioning, learn_variance=True)
    obs, noisy_actions, t = th.rand(B, F), th.randn(B, A), th.arange(B) % T
    skip, out, scale_in = PRECONDITIONINGS[preconditioning](geometric_ratios(T).float()[t, None])
    answer, excess = actor.denoiser(obs, scale_in * noisy_actions, t).chunk(2, dim=1)
    mean, variance = actor.denoise(obs, noisy_actions, t)
    np.testing.assert_allclose(mean.detach(), (skip * noisy_actions + out * answer).detach(), atol=1e-6)
    np.testing.assert_allclose(variance.detach(), (out**2 * (1 + excess)).detach(), rtol=1e-5, atol=1e-7)


def test_no_variance_of_a_chain_is_negative():
    actor = make_actor(n_diffusion_steps=T, learn_variance=True)
    with th.no_grad():
        actor.denoiser.head[-1].bias[A:] = -3.0
        _, of_batch = actor.denoise(th.rand(B, F), th.randn(B, A), th.arange(B) % T)
        _, of_chain = actor.denoise_fn(th.rand(B, F))(th.randn(B, A), 1)
    assert (of_batch < 0).all() and (of_chain == 0).all()


def test_without_a_variance_guesses_are_certain():
    actor = make_actor(n_diffusion_steps=T)
    assert actor.denoiser(th.rand(B, F), th.randn(B, A), 0).shape == (B, A)
    assert actor.denoise(th.rand(B, F), th.randn(B, A), th.arange(B) % T)[1].numel() == 0
    assert actor.denoise_fn(th.rand(B, F))(th.randn(B, A), 0)[1] == 0.0


def test_sample_reads_noise_by_level():
    """The first slice starts the chain; slice 1 + t is the noise of level t."""
    seen = []

    def sampler(denoise_fn, ratios, start, noise):
        seen.append((ratios, start, noise))
        return start

    actor = make_actor(n_diffusion_steps=2, sampler=sampler)
    noise = th.randn(3, B, A)
    actor.sample(th.zeros(B, F), noise)
    ((ratios, start, rest),) = seen
    assert ratios == pytest.approx([0.1, 2.5]) and all(type(ratio) is float for ratio in ratios)
    np.testing.assert_allclose(start, math.sqrt(1 + 2.5**2) * noise[0], rtol=1e-6)
    assert len(rest) == 2 and th.equal(th.stack(rest), noise[1:])


@pytest.mark.parametrize("denoiser_class", DENOISERS)
def test_chain_goes_through_every_module(denoiser_class):
    """What hooks, adapters and quantisation rest on: each layer is called, and another one in its place is used."""

    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1.0

    actor = make_actor(n_diffusion_steps=T, denoiser_class=denoiser_class)
    called = set()
    layers = {name: layer for name, layer in actor.denoiser.named_modules() if not list(layer.children())}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *args, name=name: called.add(name))
    before, _ = actor.denoise_fn(th.zeros(B, F))(th.zeros(B, A), 1)
    assert called == {name for name in layers if not isinstance(layers[name], nn.Identity)}
    name = next(name for name, layer in reversed(layers.items()) if isinstance(layer, nn.Linear))
    old = actor.denoiser.get_submodule(name)
    adapted = Adapted(old.in_features, old.out_features)
    adapted.load_state_dict(old.state_dict())
    actor.denoiser.set_submodule(name, adapted)
    after, _ = actor.denoise_fn(th.zeros(B, F))(th.zeros(B, A), 1)
    assert (after - before).abs().min() > 0.05
    np.testing.assert_allclose(
        after.detach(), actor.denoise(th.zeros(B, F), th.zeros(B, A), th.ones(B).long())[0].detach(), atol=1e-5
    )


def test_running_mean_by_hand():
    """9/10 of the way at first, 9/11 next, later 1 - decay; the deterministic action is that of the mean."""
    actor = make_actor(n_diffusion_steps=T)
    weight, mean = (networks["denoiser"].action_layer.weight for networks in (actor.networks(), actor.average))
    start = mean.clone()
    assert th.equal(weight, start) and not actor.has_average() and not mean.requires_grad
    weight.data.add_(1.0)
    actor.update_average(decay=0.75)
    th.testing.assert_close(mean, start + 0.9)
    actor.update_average(decay=0.75)
    th.testing.assert_close(mean, start + 1 - 0.1 * 2 / 11)
    actor.n_averaged.fill_(1000)
    actor.update_average(decay=0.75)
    th.testing.assert_close(mean, start + 1 - 0.75 * 0.1 * 2 / 11)
    obs, noise = th.zeros(1, F), th.zeros(1 + T, 1, A)
    assert th.equal(actor(obs, deterministic=True), actor.sample(obs, noise, average=True))
    assert not th.equal(actor.sample(obs, noise), actor.sample(obs, noise, average=True))


def test_weights_answer_until_there_is_a_mean():
    actor, obs = make_actor(), th.zeros(1, F)
    for parameter in actor.denoiser.parameters():
        parameter.data.normal_()
    assert th.equal(actor(obs, deterministic=True), actor.sample(obs, th.zeros(7, 1, A)))
    actor.update_average(decay=0.0)
    mean = actor.average["denoiser"].state_dict()
    assert all(th.equal(weight, mean[name]) for name, weight in actor.denoiser.state_dict().items())


@pytest.mark.parametrize(
    "ratios", [[0.1, 0.1], [0.2, 0.1], [0.0, 1.0], [-1.0, 1.0], [0.1, math.inf], [math.nan, 1.0], [0.1], [[0.1, 1.0]]]
)
def test_ratios_that_are_refused(ratios):
    with pytest.raises(ValueError, match=r"noise_schedule must return n_diffusion_steps=2 positive rising ratios, got \["):
        make_actor(n_diffusion_steps=2, noise_schedule=lambda n_steps: th.tensor(ratios))
