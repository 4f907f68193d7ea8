"""What an update computes: losses by hand, what moves when, and what is logged."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

from sb3_qsm import QSM, PublishedQSM
from sb3_qsm.losses import SCORE_TARGETS, box_entropy, truncated_normal_mean
from sb3_qsm.networks import DENOISERS
from sb3_qsm.representation import representation_loss

SMALL = dict(learning_starts=20, batch_size=8, buffer_size=500, seed=0, device="cpu")


ERROR = th.tensor(0.0)  # of the critics, which only ``keep_modes`` looks at


def build(env="Pendulum-v1", algorithm=QSM, **kwargs):
    kwargs["policy_kwargs"] = dict(net_arch=[16]) | kwargs.get("policy_kwargs", {})
    return algorithm("MlpPolicy", env, **SMALL | kwargs)


def vector(module):
    return nn.utils.parameters_to_vector(module.parameters()).detach()


@pytest.mark.parametrize("interval, n_updates, moved", [(1, 1, True), (3, 2, False), (3, 3, True)])
def test_target_update_interval(interval, n_updates, moved):
    model = build(tau=1.0, target_update_interval=interval).learn(20 + n_updates)
    assert th.equal(vector(model.critic), vector(model.critic_target)) == moved


@pytest.mark.parametrize("ema_decay", [0.75, 0.0])
def test_running_mean_follows_at_each_update_of_the_actor(ema_decay):
    model = build(ema_decay=ema_decay)
    before, weights = vector(model.actor.average), [model.actor.features_extractor, model.actor.denoiser]
    model.learn(22)  # two updates of the critics, one of the actor
    learnt = th.cat([vector(module) for module in weights if list(module.parameters())])
    assert not th.equal(before, learnt) and model.actor.n_averaged == 1
    th.testing.assert_close(vector(model.actor.average), 0.1 * before + 0.9 * learnt if ema_decay else learnt)


def test_the_weights_that_learn_explore_and_their_mean_answers():
    model = build(learning_starts=0)
    model.actor.update_average(0.0)
    values = {False: 0.25, True: -0.5}
    model.actor.sample = lambda obs, noise, average=False: th.full((len(obs), 1), values[average])
    model.learn(5)
    assert (model.replay_buffer.actions[:5] == 0.25).all()
    assert model.predict(np.zeros(3))[0] == pytest.approx(2 * 0.25)  # the pendulum's torque
    assert model.predict(np.zeros(3), deterministic=True)[0] == pytest.approx(2 * -0.5)


@pytest.mark.parametrize("delay, n_updates, n_actor_updates", [(1, 3, 3), (2, 1, 1), (2, 2, 1), (2, 3, 2), (3, 7, 3)])
def test_policy_delay(delay, n_updates, n_actor_updates):
    """The first update is one of both; the temperature moves with the actor only, the critics each time."""
    model = build(policy_delay=delay)
    moved = []
    model.temperature.update = lambda entropy: moved.append(entropy) or entropy
    model.learn(20 + n_updates)
    steps = [int(o.state_dict()["state"][0]["step"]) for o in (model.critic.optimizer, model.actor.optimizer)]
    assert [*steps, len(moved)] == [n_updates, n_actor_updates, n_actor_updates]


class LastDump(KVWriter):
    """Keeps what was logged last."""

    def write(self, key_values, key_excluded, step=0):
        self.values = dict(key_values)

    def close(self):
        pass


def test_metrics():
    writer = LastDump()
    model = build(env=gym.make("Pendulum-v1", max_episode_steps=10), ent_coef="auto_0.3", learning_rate=1e-3)
    model.set_logger(Logger(None, [writer]))
    model.learn(40, log_interval=1)
    names = [
        "critic_loss",
        "actor_loss",
        "representation_loss",
        "ent_coef",
        "ent_coef_loss",
        "entropy",
        "q_grad",
        "reward_scale",
    ]
    assert {name for name in writer.values if name.startswith("train/")} == {
        f"train/{name}" for name in [*names, "n_updates", "learning_rate"]
    }
    assert all(math.isfinite(writer.values[f"train/{name}"]) for name in names)
    assert writer.values["train/reward_scale"] == pytest.approx(model.reward_scale.value().item(), rel=0.1) != 1
    assert writer.values["train/n_updates"] == 19 and writer.values["train/learning_rate"] == 1e-3
    assert model.temperature.value() < writer.values["train/ent_coef"] < 0.3, "the mean of a temperature that falls"
    assert writer.values["time/total_timesteps"] == 40


def set_critic(critic, slopes, values):
    """Make the i-th critic of one without hidden layers Q_i = slopes[i] * action + values[i]."""
    for q_net, slope, value in zip(critic.q_networks, slopes, values, strict=True):
        (layer,) = (module for module in q_net if isinstance(module, nn.Linear))
        layer.weight.data.zero_()
        layer.weight.data[0, -1] = slope
        layer.bias.data.fill_(value)


LINEAR_CRITIC = dict(net_arch=dict(pi=[8], qf=[]), layer_norm=False, embedding_dim=None)
BATCH = ReplayBufferSamples(
    observations=th.zeros(2, 3),
    actions=th.tensor([[0.5], [-0.5]]),
    next_observations=th.ones(2, 3),
    dones=th.tensor([[0.0], [1.0]]),
    rewards=th.tensor([[1.0], [2.0]]),
)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_critic_loss_by_hand(scale):
    """Rewards 1 and 2, divided by their scale; values are in its units."""
    model = build(policy_kwargs=LINEAR_CRITIC, gamma=0.5)
    model.reward_scale.rms.fill_(scale)
    set_critic(model.critic, slopes=[1.0, 0.0], values=[0.0, 3.0])
    set_critic(model.critic_target, slopes=[0.0, 0.0], values=[4.0, 6.0])
    # The next value is 4.5, halfway from the mean to the smallest of 4 and 6: targets 1 / scale + 0.5 * 4.5 and 2 / scale (the
    # episode ended); values (0.5, -0.5) and (3, 3)
    values = np.array([[0.5, -0.5], [3.0, 3.0]])
    for discount, data in ((0.5, BATCH), (0.25, BATCH._replace(discounts=th.full((2, 1), 0.25)))):  # those replace gamma
        targets = np.array([1 / scale + discount * 4.5, 2 / scale])
        assert model._critic_loss(data).item() == pytest.approx(((values - targets) ** 2).mean(axis=1).sum())


@pytest.mark.parametrize("pessimism, next_value", [(0.0, 6.0), (0.25, 5.0), (1.0, 2.0)])
def test_pessimism_goes_from_the_mean_to_the_smallest(pessimism, next_value):
    model = build(policy_kwargs=LINEAR_CRITIC | dict(n_critics=3), gamma=0.5, pessimism=pessimism)
    set_critic(model.critic, slopes=[0.0] * 3, values=[0.0] * 3)
    set_critic(model.critic_target, slopes=[0.0] * 3, values=[4.0, 12.0, 2.0])
    # Targets 1 + 0.5 * next_value and 2 (the episode ended), values 0
    expected = 3 * ((1 + 0.5 * next_value) ** 2 + 2**2) / 2
    assert model._critic_loss(BATCH).item() == pytest.approx(expected)


@pytest.mark.parametrize("algorithm, noise_std", [(QSM, 0.0), (PublishedQSM, 1e6)])
def test_critic_loss_looks_at_the_next_action(algorithm, noise_std):
    model = build(algorithm=algorithm, policy_kwargs=LINEAR_CRITIC, gamma=1.0)
    model.noise_std = noise_std
    set_critic(model.critic, slopes=[0.0, 0.0], values=[0.0, 0.0])
    set_critic(model.critic_target, slopes=[1.0, 1.0], values=[0.0, 0.0])
    for parameter in model.actor.average.parameters():  # the running mean has no say
        parameter.data.fill_(math.nan)
    batch = ReplayBufferSamples(*(value[:1].expand(50, -1) for value in BATCH[:5]))
    loss = model._critic_loss(batch).item() / 2
    # Targets are 1 + a: with a on either bound they are 0 or 2, with a mean square between 0 and 4
    assert 0 < loss < 4
    if noise_std:
        assert (loss / 4 * 50) == pytest.approx(round(loss / 4 * 50), abs=1e-3)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("score_target", SCORE_TARGETS)
def test_actor_follows_the_online_critics(score_target, scale):
    """
    Of slopes 1 and 3 it climbs the mean; the target critics, here broken, have no say. The temperature is in units of the
    return, the critics' values are in those of the reward scale.
    """
    model = build(policy_kwargs=LINEAR_CRITIC, ent_coef=0.5, score_target=score_target)
    model.reward_scale.rms.fill_(scale)
    set_critic(model.critic, slopes=[1.0, 3.0], values=[0.0, 0.0])
    set_critic(model.critic_target, slopes=[math.nan, math.nan], values=[math.nan, math.nan])
    loss, entropy, q_grad = model._actor_loss(BATCH, ERROR)
    assert math.isfinite(loss.item())
    assert q_grad.item() == pytest.approx(2.0 * scale)
    assert entropy.item() == pytest.approx(box_entropy(th.tensor(2.0 * scale / 0.5)).item())
    assert all(parameter.grad is None for parameter in model.critic.parameters())


def test_entropy_is_the_sum_over_dimensions():
    model = build(env="Reacher-v5", policy_kwargs=LINEAR_CRITIC, ent_coef=0.5)
    set_critic(model.critic, slopes=[2.0, 2.0], values=[0.0, 0.0])  # in the last of two dimensions
    _, entropy, _ = model._actor_loss(BATCH._replace(observations=th.zeros(2, 10), actions=th.zeros(2, 2)), ERROR)
    assert entropy.item() == pytest.approx(box_entropy(th.tensor(2.0 / 0.5)).item() + math.log(2))


@pytest.mark.parametrize("score_target", ["box", "published"])
def test_actor_loss_by_hand(score_target):
    """A denoiser that answers 0 leaves a_0 = c_skip u, whose distance to the target is the loss."""
    model = build(policy_kwargs=LINEAR_CRITIC, ent_coef=0.5, score_target=score_target)
    set_critic(model.critic, slopes=[1.0, 3.0], values=[0.0, 0.0])
    for parameter in model.actor.denoiser.parameters():
        parameter.data.zero_()
    batch = ReplayBufferSamples(*(value[:1].expand(50_000, -1) for value in BATCH[:5]))
    loss = model._actor_loss(batch, ERROR)[0].item()

    t = th.arange(50_000) % 6
    noise = th.randn((50_000, 1), generator=th.Generator().manual_seed(1))
    ratio = 0.1 * 25 ** (t[:, None] / 5)
    noisy_actions = 0.5 + ratio * noise
    # The normal around u, moved by r^2 g / lambda = 4 r^2 or 4 r, on the box; the published noise is -g / lambda = -4
    target = {
        "box": truncated_normal_mean(noisy_actions + ratio * (4 * ratio).clamp(max=4), ratio),
        "published": noisy_actions + 4 * ratio,
    }[score_target]
    skip = 0.36 / (0.36 + ratio**2)
    out = 0.6 * ratio / (0.36 + ratio**2).sqrt()
    expected = (((skip * noisy_actions - target) / out) ** 2).mean().item()
    assert loss == pytest.approx(expected, rel=0.03)


def test_variance_is_learnt_beside_the_mean():
    """
    A denoiser that answers 0 has a mean of c_skip u, whose slope implies just the variance that it answers; an excess of b
    costs b^2 more, and without a variance there is no such term.
    """

    def loss(learn_variance, excess):
        model = build(policy_kwargs=dict(LINEAR_CRITIC, learn_variance=learn_variance), ent_coef=0.5)
        set_critic(model.critic, slopes=[1.0, 3.0], values=[0.0, 0.0])
        for parameter in model.actor.denoiser.parameters():
            parameter.data.zero_()
        model.actor.denoiser.head[-1].bias.data[1:] = excess
        th.manual_seed(0)
        return model._actor_loss(BATCH, ERROR)[0].item()

    assert loss(True, 0.0) == pytest.approx(loss(False, 0.0), rel=1e-5)
    assert loss(True, 2.0) == pytest.approx(loss(False, 0.0) + 4.0, rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_keep_modes_values_the_better_of_two_draws(scale):
    """Draws of values 1 and 3, in units of the reward scale, for a temperature of 2 in units of the return."""
    model = build(policy_kwargs=LINEAR_CRITIC, gamma=0.5, ent_coef=2.0, keep_modes=True)
    model.reward_scale.rms.fill_(scale)
    set_critic(model.critic_target, slopes=[1.0, 1.0], values=[2.0, 2.0])
    draws = iter([-1.0, 1.0])
    model.actor.sample = lambda obs, noise, average=False: th.full((len(obs), 1), next(draws))
    odds = math.exp((3 - 1) / (2 / scale))  # of the second draw
    expected = (1 + 3 * odds) / (1 + odds)
    assert model._next_values(BATCH.next_observations).flatten().tolist() == pytest.approx([expected] * 2)
    assert next(draws, None) is None


def test_keep_modes_does_not_choose_within_the_critics_error():
    """Levels of much noise aim at the temperature of three errors, those of little noise and the entropy at the model's."""
    model = build(policy_kwargs=LINEAR_CRITIC, ent_coef=0.5, keep_modes=True)
    model.reward_scale.rms.fill_(4.0)
    set_critic(model.critic, slopes=[2.0, 2.0], values=[0.0, 0.0])
    asked = []

    def score_target(q_fn, denoised, variance, noisy_actions, ratio, ent_coef):
        asked.append((ratio, ent_coef))
        return denoised, th.full_like(denoised, 2.0)

    model._score_target = score_target
    batch = ReplayBufferSamples(*(value[:1].expand(100, -1) for value in BATCH[:5]))
    _, entropy, q_grad = model._actor_loss(batch, th.tensor(1.5))
    (ratio, ent_coef), *_ = asked
    assert set(ratio.flatten().tolist()) == set(model.actor.levels)
    assert ent_coef.tolist() == [[4.5] if r > 0.3 else [0.125] for (r,) in ratio.tolist()]
    assert entropy.item() == pytest.approx(box_entropy(th.tensor(2.0 / 0.125)).item()) and q_grad.item() == 8


def test_heights_learn_the_variance():
    assert build(score_target="heights").actor.learn_variance and not build().actor.learn_variance
    with pytest.raises(ValueError, match="learn_variance must be True with score_target='heights', got False"):
        build(score_target="heights", policy_kwargs=dict(learn_variance=False))


@pytest.mark.parametrize("keep_modes", [False, True])
@pytest.mark.parametrize("denoiser_class", DENOISERS)
@pytest.mark.parametrize("score_target", SCORE_TARGETS)
def test_update_never_waits_for_the_device(score_target, denoiser_class, keep_modes):
    """Tensors without data stand for those of a GPU: ``.item()`` or a branch on a value would raise."""
    model = build(score_target=score_target, keep_modes=keep_modes, policy_kwargs=dict(denoiser_class=denoiser_class))
    model.policy.to("meta")
    model.temperature.to("meta")
    model.reward_scale.to("meta")
    model.device = th.device("meta")
    batch = ReplayBufferSamples(*(value.to("meta") for value in BATCH[:5]))
    model.reward_scale.update(batch.rewards)
    critic_loss = model._critic_loss(batch)
    actor_loss, entropy, _ = model._actor_loss(batch, critic_loss.detach())
    foretold = representation_loss(model.representation, model.actor.slow_representation, batch, model.reward_scale.value())
    for loss in (critic_loss, actor_loss, foretold):
        loss.backward()
    model.representation.update_norm(batch.observations)
    model.actor.update_average(model.ema_decay)
    model.temperature.update(entropy)
    assert all(parameter.grad is not None for parameter in model.critic.parameters())
    with pytest.raises(RuntimeError, match="meta"):
        actor_loss.item()


@pytest.mark.parametrize("n_updates", [1, 5, 10])
def test_published_rate_falls_along_a_cosine(n_updates):
    model = build(algorithm=PublishedQSM, learning_rate=1e-3)
    model.actor_lr_decay_updates = 8
    model.learn(20 + n_updates)
    # The rate of the last update, which n_updates - 1 went before
    cosine = 0.5 * (1 + math.cos(math.pi * min(1, (n_updates - 1) / 8)))
    rates = [network.optimizer.param_groups[0]["lr"] for network in (model.actor, model.critic)]
    assert model._n_updates == n_updates and rates == pytest.approx([1e-3 * cosine, 1e-3])


def test_published_behaviour_is_noisy():
    model = build(algorithm=PublishedQSM, env="Reacher-v5", learning_starts=0)
    assert model.action_noise._sigma.tolist() == [0.1, 0.1] and model.action_noise._mu.tolist() == [0, 0]
    model.learn(3)
