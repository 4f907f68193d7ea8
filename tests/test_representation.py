"""The representation: what it learns, from what, and who looks through which copy of it."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

from sb3_qsm import QSM
from sb3_qsm.buffers import NStepReplayBuffer
from sb3_qsm.representation import RunningNorm, representation_loss

SMALL = dict(learning_starts=20, batch_size=8, buffer_size=500, seed=0, device="cpu")


def build(env="Pendulum-v1", policy="MlpPolicy", **policy_kwargs):
    return QSM(policy, env, policy_kwargs=dict(net_arch=[16], embedding_dim=8) | policy_kwargs, **SMALL)


def vector(module):
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def test_norm_is_that_of_all_batches_and_the_start():
    """As long as shares are one over the number of batches, mean and variance are those of everything seen."""
    batches = [10 + th.randn(4, 2) * th.tensor([1.0, 0.1]) for _ in range(5)]
    norm = RunningNorm(2, rate=0.01)
    for batch in batches:
        norm.update(batch)
    start = th.tensor([[-1.0, -1.0], [1.0, 1.0]]).repeat(20, 1)  # ten batches of mean 0 and variance 1
    seen = th.cat([start, *batches]).double()
    th.testing.assert_close(norm.mean.double(), seen.mean(dim=0), rtol=1e-5, atol=0)
    th.testing.assert_close(norm.variance.double(), seen.var(dim=0, correction=0), rtol=1e-3, atol=0)


def test_norm_forgets():
    """What has not moved for long is forgotten; a spread of 1.2 beside a floor of 0.5 is one of 1.3."""
    norm = RunningNorm(1, rate=0.1, floor=0.5)
    for _ in range(300):
        norm.update(th.full((4, 1), 7.0) + th.tensor([[-1.2], [-1.2], [1.2], [1.2]]))
    assert norm(th.tensor([[7.0], [8.3], [4.4], [100.0], [-100.0]])).flatten().tolist() == pytest.approx(
        [0, 1, -2, 5, -5], abs=1e-3
    )


def batch(n=6, dones=0.0, rewards=0.0):
    return ReplayBufferSamples(
        observations=th.randn(n, 3),
        actions=th.rand(n, 1),
        next_observations=th.randn(n, 3),
        dones=th.full((n, 1), dones),
        rewards=th.full((n, 1), rewards),
    )


def test_loss_by_hand():
    """All is foretold as 0: states' embeddings have variance 1, the reward is 6 in units of 2, the end counts threefold."""
    model = build()
    for layer in [*model.representation.pair_net, model.representation.reward_and_end]:
        for parameter in layer.parameters():
            parameter.data.zero_()
    for dones, expected in ((0.0, 1 + 0.1 * 3**2), (1.0, 1 + 0.1 * (3**2 + 3**2))):
        data = batch(dones=dones, rewards=6.0)
        loss = representation_loss(model.representation, model.actor.slow_representation, data, th.tensor(2.0))
        assert loss.item() == pytest.approx(expected, rel=1e-2)


def test_the_slow_copy_embeds_the_next_state_only():
    model = build()
    learning, slow = model.representation, model.actor.slow_representation
    loss = representation_loss(learning, slow, batch(), th.ones(()))
    loss.backward()
    assert all(parameter.grad is not None for parameter in learning.parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in slow.parameters())
    with th.no_grad():
        slow.state_net[0].weight.fill_(th.nan)
    assert representation_loss(learning, slow, batch(), th.ones(())).isnan()
    with th.no_grad():
        slow.load_state_dict(learning.state_dict())
        slow.pair_net[0].weight.fill_(th.nan)
    assert representation_loss(learning, slow, batch(), th.ones(())).isfinite()


def test_the_slow_copy_follows():
    model = build()
    model.tau = 0.25
    model.learn(20)
    before, started = vector(model.actor.slow_representation), vector(model.representation)
    assert th.equal(before, started)
    model.learn(1, reset_num_timesteps=False)
    learnt = vector(model.representation)
    assert not th.equal(learnt, started)
    th.testing.assert_close(vector(model.actor.slow_representation), 0.75 * before + 0.25 * learnt)
    for name, statistic in model.representation.norm.named_buffers():
        assert th.equal(statistic, getattr(model.actor.slow_representation.norm, name)), name
    assert model.representation.norm.n_batches == 1


@pytest.mark.parametrize("part", ["state_net", "pair_net", "norm"])
def test_who_looks_through_the_slow_copy(part):
    """Critics, their targets and the actor; of what learns beside, none. The actor's denoiser has no pair to look at."""
    model = build().learn(30)
    obs, actions, noise = th.randn(5, 3), th.rand(5, 1), th.randn(7, 5, 1)

    def answers():
        with th.no_grad():
            values = [th.cat(critic(obs, actions), dim=1) for critic in (model.critic, model.critic_target)]
            return [*values, *(model.actor.sample(obs, noise, average) for average in (False, True))]

    def changed(representation):
        before = answers()
        with th.no_grad():
            for value in getattr(representation, part).state_dict().values():
                value.add_(0.3)
        return [not th.equal(old, new) for old, new in zip(before, answers(), strict=True)]

    assert changed(model.representation) == [False] * 4
    assert changed(model.actor.slow_representation) == [True, True, part != "pair_net", part != "pair_net"]


def test_the_gradient_of_q_goes_through_the_pair():
    model = build(net_arch=dict(pi=[8], qf=[]), layer_norm=False)
    obs, actions = th.randn(4, 3), th.rand(4, 1, requires_grad=True)
    for q_network in model.critic.q_networks:
        q_network[0].weight.data.zero_()
        q_network[0].weight.data[0, -8:] = 1.0  # Q is the sum over the pair's embedding
    value = model.critic(obs, actions)[0]
    slow = model.actor.slow_representation
    expected = slow.pair(slow.state(obs), actions).sum(dim=1, keepdim=True)
    th.testing.assert_close(value - model.critic.q_networks[0][0].bias, expected)
    found, wanted = (th.autograd.grad(of.sum(), actions, retain_graph=True)[0] for of in (value, expected))
    th.testing.assert_close(found, wanted)
    assert (found != 0).all()
    assert th.equal(model.critic.q1_forward(obs, actions), value)


def test_what_each_network_sees():
    """Features and z_s; for the critics then the action and z_sa."""
    model = build()
    obs, actions = 2 * th.randn(5, 3), th.rand(5, 1)
    slow = model.actor.slow_representation
    slow.norm.mean.fill_(1.0)
    slow.norm.variance.fill_(4.0)
    features = model.actor.extract_features(obs, model.actor.features_extractor)
    x, z = features.split([3, 8], dim=1)
    th.testing.assert_close(x, ((obs - 1) / 4.25**0.5).clamp(-5, 5))
    assert th.equal(z, slow.state(obs))
    th.testing.assert_close(z.mean(dim=1), th.zeros(5), atol=1e-6, rtol=0)
    seen = []
    model.critic.qf0.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.critic(obs, actions)
    assert th.equal(seen[0], th.cat([features, actions, slow.pair(z, actions)], dim=1))


def test_observations_are_embedded_once_in_an_update():
    """By the slow copy: those of the batch and the next ones, and the next ones of single steps."""
    model = build().learn(20)
    seen = []
    model.actor.slow_representation.state_net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.train(gradient_steps=1, batch_size=8)
    assert len(seen) == 3
    obs, actions = th.randn(5, 3), th.rand(5, 1)
    outside = model.critic(obs, actions)
    with model.actor.remembering(obs):
        inside = model.critic(obs, actions)
        equal_but_another = model.critic(obs.clone(), actions)
    assert len(seen) == 3 + 3
    for values in (inside, equal_but_another):
        assert all(th.equal(value, expected) for value, expected in zip(values, outside, strict=True))
    model.critic(obs, actions)
    assert len(seen) == 3 + 4, "outside the block nothing is remembered"


class Chain(gym.Env):
    """The state turns by a constant angle and by the action; the reward is the action's cost and the first coordinate."""

    observation_space = spaces.Box(-10, 10, (2,))
    action_space = spaces.Box(-1, 1, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.angle = self.np_random.uniform(-np.pi, np.pi)
        return self._obs(), {}

    def _obs(self):
        return np.array([np.cos(self.angle), np.sin(self.angle)], np.float32)

    def step(self, action):
        self.angle += 0.5 + 0.3 * float(action[0])
        obs = self._obs()
        return obs, float(obs[0] - action[0] ** 2), False, False, {}


def test_next_state_and_reward_are_learnt():
    model = QSM("MlpPolicy", Chain(), learning_starts=500, seed=0, device="cpu", learning_rate=1e-3)
    model.learn(500)
    data = model.replay_buffer.sample_transitions(256)

    def errors():
        learning, slow = model.representation, model.actor.slow_representation
        with th.no_grad():
            pairs = learning.pair(learning.state(data.observations), data.actions)
            next_states = slow.state(data.next_observations)
            unexplained = ((pairs - next_states) ** 2).mean() / next_states.var(dim=0, correction=0).mean()
            rewards = model.reward_scale.value() * learning.reward_and_end(pairs)[:, :1]
            return unexplained.item(), ((rewards - data.rewards) ** 2).mean().item() / data.rewards.var().item()

    before = errors()
    model.train(gradient_steps=1000, batch_size=64)
    after = errors()
    assert before[0] > 0.5 and before[1] > 0.5
    assert after[0] < 0.05 and after[1] < 0.05, after


def test_single_steps_beside_longer_returns():
    """Observation i leads to i + 1 with reward i; every tenth step ends, every other of those by the time limit."""
    buffer = NStepReplayBuffer(100, spaces.Box(-1e3, 1e3, (1,)), spaces.Box(-1, 1, (1,)), device="cpu", n_steps=3)
    for i in range(100):
        limit = i % 20 == 19
        done = np.array([i % 10 == 9])
        buffer.add(
            *(np.array([[value]], np.float32) for value in (i, i + 1, 0)),
            np.array([i]),
            done,
            [{"TimeLimit.truncated": limit}],
        )
    found = buffer.sample_transitions(200)
    assert th.equal(found.next_observations, found.observations + 1)
    assert th.equal(found.rewards, found.observations)
    assert th.equal(found.dones, (found.observations % 20 == 9).float())
    assert len(found.observations.unique()) > 50 and buffer.sample(50).rewards.max() > 100


@pytest.mark.parametrize("n_steps", [1, 3])
def test_the_representation_learns_from_single_steps(n_steps, monkeypatch):
    """Those of the batch itself, or as many drawn beside it."""
    model = QSM(
        "MlpPolicy", "Pendulum-v1", n_steps=n_steps, policy_kwargs=dict(net_arch=[16], embedding_dim=8), **SMALL
    ).learn(30)
    seen = {}
    monkeypatch.setattr(model, "_critic_loss", lambda data: seen.setdefault("batch", data) and model.critic.qf0[0].bias.sum())
    monkeypatch.setattr(
        "sb3_qsm.qsm.representation_loss",
        lambda learning, slow, data, scale: seen.setdefault("steps", data) and learning.reward_and_end.bias.sum(),
    )
    model.train(gradient_steps=1, batch_size=8)
    assert (seen["steps"] is seen["batch"]) == (n_steps == 1)
    stored = th.as_tensor(model.replay_buffer.rewards[:30, 0])
    assert len(seen["steps"].rewards) == 8 and th.isin(seen["steps"].rewards.flatten(), stored).all()


def test_images_are_embedded_by_an_extractor_that_learns():
    model = QSM(
        "CnnPolicy", FakeImageEnv(discrete=False, screen_height=36, screen_width=36), policy_kwargs=dict(net_arch=[8]), **SMALL
    )
    before = [vector(model.representation.features_extractor), vector(model.actor.slow_representation.features_extractor)]
    assert th.equal(*before) and len(before[0]) > 0
    model.learn(22)
    after = [vector(model.representation.features_extractor), vector(model.actor.slow_representation.features_extractor)]
    assert all(not th.equal(old, new) for old, new in zip(before, after, strict=True)) and not th.equal(*after)
    assert model.actor.features_extractor is not model.actor.slow_representation.features_extractor


def test_without():
    model = build(embedding_dim=None).learn(30)
    assert model.representation is None and model.actor.slow_representation is None
    assert not any("representation" in name for name in [*model.policy.state_dict(), *model.get_parameters()])


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_embedding_dim_is_checked(value):
    with pytest.raises(ValueError, match=f"embedding_dim must be None or an integer of at least 1, got {value}"):
        build(embedding_dim=value)
