"""The unit of values: measured on the rewards that are learnt from, whatever their type, size and way into the buffer."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.wrappers import TransformReward
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from torch import nn

from sb3_qsm import QSM
from sb3_qsm.normalization import RewardScale

SMALL = dict(learning_starts=20, batch_size=8, buffer_size=500, seed=0, device="cpu", policy_kwargs=dict(net_arch=[16]))


def vector(module):
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def test_by_hand():
    scale = RewardScale(rate=0.25)
    assert scale.value() == 1
    scale.update(th.zeros(2, 1))
    assert scale.value() == 1
    scale = RewardScale(rate=0.25)
    expected = [(1 + 9) / 2, (5 + 16) / 2, (10.5 * 2 + 0) / 3, (7 * 3 + 4) / 4, 0.75 * 6.25 + 0.25 * 100]
    for rewards, square in zip(([1.0, -3.0], [4.0, -4.0], [0.0, 0.0], [2.0, 2.0], [10.0, 10.0]), expected, strict=True):
        scale.update(th.tensor(rewards)[:, None])
        assert scale.value().item() == pytest.approx(math.sqrt(square), rel=1e-6)


@pytest.mark.parametrize("size", [1e-20, 1e19, 1e30])
def test_squares_do_not_overflow(size):
    scale = RewardScale()
    for _ in range(3):
        scale.update(th.full((4, 1), -size))
    assert scale.value().item() == pytest.approx(size, rel=1e-5)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_broken_rewards_leave_it_alone(broken):
    scale = RewardScale()
    scale.update(th.full((4, 1), 2.0))
    scale.update(th.tensor([[1.0], [broken]]))
    assert scale.value() == 2


def learn_scaled(factor, **kwargs):
    env = TransformReward(gym.make("Pendulum-v1"), lambda reward: factor * reward)
    return QSM("MlpPolicy", env, n_steps=3, ent_coef=f"auto_{factor}", **SMALL | kwargs).learn(60)


@pytest.mark.parametrize("factor", [0.125, 64.0])
def test_scale_of_rewards_is_irrelevant(factor):
    """With powers of two and a temperature that starts in proportion, all but its logarithm is rounded alike."""
    plain, scaled = learn_scaled(1.0), learn_scaled(factor)
    np.testing.assert_allclose(vector(scaled.policy), vector(plain.policy), atol=1e-6)
    assert scaled.temperature.value() / plain.temperature.value() == pytest.approx(factor, rel=1e-5)
    assert scaled.reward_scale.value() == factor * plain.reward_scale.value()
    fixed = [learn_scaled(f, normalize_reward=False) for f in (1.0, factor)]
    assert [model.reward_scale.value() for model in fixed] == [1, 1]
    assert not th.allclose(*(vector(model.policy) for model in fixed), atol=1e-3)


@pytest.mark.parametrize("n_steps", [1, 3, 5])
def test_is_of_one_step_of_the_return(n_steps):
    env = TransformReward(gym.make("Pendulum-v1"), lambda reward: -7.0)
    model = QSM("MlpPolicy", env, n_steps=n_steps, gamma=0.9, **SMALL).learn(60)
    assert model.reward_scale.value().item() == pytest.approx(7, rel=1e-5)


def test_prefilled_buffer():
    """Values learnt from transitions put into the buffer keep their unit when the environment joins in."""
    env = TransformReward(gym.make("Pendulum-v1"), lambda reward: reward - 100)
    model = QSM("MlpPolicy", env, **SMALL | dict(learning_starts=0))
    rng = np.random.default_rng(0)
    for _ in range(300):
        observation, new = rng.normal(size=(2, 1, 3)).astype(np.float32)
        model.replay_buffer.add(observation, new, rng.uniform(-1, 1, (1, 1)), np.array([-105.0]), np.array([False]), [{}])
    model.set_logger(configure(None, [""]))
    model.train(100, 64)
    data = model.replay_buffer.sample(100)
    before = model.critic.q1_forward(data.observations, data.actions).mean().item()
    assert model.reward_scale.value().item() == pytest.approx(105, rel=1e-5)
    model.learn(1, reset_num_timesteps=False)
    assert model.critic.q1_forward(data.observations, data.actions).mean().item() == pytest.approx(before, rel=0.1)


class Relabelled(ReplayBuffer):
    def _get_samples(self, batch_inds, env=None):
        samples = super()._get_samples(batch_inds, env)
        return samples._replace(rewards=th.full_like(samples.rewards, 2.0))


def test_relabelled_rewards():
    env = TransformReward(gym.make("Pendulum-v1"), lambda reward: 1000.0)
    model = QSM("MlpPolicy", env, replay_buffer_class=Relabelled, **SMALL).learn(40)
    assert model.reward_scale.value().item() == pytest.approx(2)


class Lists(DummyVecEnv):
    """Returns rewards as a list."""

    def step_wait(self):
        observations, rewards, dones, infos = super().step_wait()
        return observations, [float(reward) for reward in rewards], dones, infos


@pytest.mark.parametrize("reward", [np.float16(300), np.int16(200), np.uint8(200), np.int32(50_000), np.bool_(True), -1e19])
@pytest.mark.parametrize("vec_env", [DummyVecEnv, Lists])
def test_types_of_rewards(reward, vec_env):
    env = vec_env([lambda: TransformReward(gym.make("Pendulum-v1"), lambda _: reward)])
    model = QSM("MlpPolicy", env, n_steps=1, **SMALL).learn(25)
    assert model.reward_scale.value().item() == pytest.approx(abs(float(reward)), rel=1e-3)


def int16_reward(_):
    return np.int16(200)


def make_int16():
    return TransformReward(gym.make("Pendulum-v1"), int16_reward)


def test_types_of_rewards_from_other_processes():
    env = SubprocVecEnv([make_int16])
    model = QSM("MlpPolicy", env, n_steps=1, **SMALL).learn(25)
    env.close()
    assert model.reward_scale.value().item() == pytest.approx(200)


def test_goes_with_the_weights(tmp_path):
    """To a file, and into a new model: other rewards do not change at once what values stand for."""
    model = QSM("MlpPolicy", "Pendulum-v1", **SMALL).learn(40)
    scale = model.reward_scale.value()
    model.save(tmp_path / "model")
    loaded = QSM.load(tmp_path / "model", env=model.get_env())
    other = QSM("MlpPolicy", TransformReward(gym.make("Pendulum-v1"), lambda _: 0.0), **SMALL)
    other.set_parameters(model.get_parameters())
    assert loaded.reward_scale.value() == other.reward_scale.value() == scale != 1
    other.learn(30)  # ten updates, of which the first measures: a batch of nothing after the two of before
    assert other.reward_scale.value().item() == pytest.approx(scale.item() * (2 / 3) ** 0.5)
