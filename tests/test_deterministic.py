"""Same seed, same weights; deterministic predictions depend on weights and observation alone."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise

from sb3_qsm import QSM, PublishedQSM
from sb3_qsm.samplers import SAMPLERS

SMALL = dict(learning_starts=15, batch_size=8, buffer_size=200, device="cpu")


def trained(seed=0, log_interval=4, algorithm=QSM, **kwargs):
    env = gym.make("Pendulum-v1", max_episode_steps=10)
    model = algorithm("MlpPolicy", env, seed=seed, policy_kwargs=dict(net_arch=[16]), **SMALL | kwargs)
    return model.learn(45, log_interval=log_interval)


def state(model):
    return {**model.policy.state_dict(), "temperature": model.temperature.value()}


def assert_bit_equal(first, second):
    for name, value in state(first).items():
        assert th.equal(value, state(second)[name]), name


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        dict(algorithm=PublishedQSM),
        dict(n_steps=3, action_noise=NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))),
    ],
)
def test_same_seed_same_weights(kwargs):
    first, second = trained(**kwargs), trained(**kwargs)
    assert_bit_equal(first, second)
    np.testing.assert_array_equal(first.replay_buffer.actions, second.replay_buffer.actions)


def test_other_seed_other_weights():
    first, second = trained(seed=0), trained(seed=1)
    assert not th.equal(state(first)["critic.qf0.0.weight"], state(second)["critic.qf0.0.weight"])


def test_same_seed_with_several_environments():
    models = []
    for _ in range(2):
        env = make_vec_env("Pendulum-v1", n_envs=2, seed=0)
        model = QSM("MlpPolicy", env, seed=0, gradient_steps=-1, policy_kwargs=dict(net_arch=[16]), **SMALL)
        models.append(model.learn(30))
    assert_bit_equal(*models)


@pytest.mark.parametrize("log_interval", [None, 1])
def test_logging_does_not_change_learning(log_interval):
    assert_bit_equal(trained(log_interval=log_interval), trained(log_interval=1000))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_deterministic_prediction_is_pure(sampler):
    model = QSM("MlpPolicy", "Pendulum-v1", seed=0, policy_kwargs=dict(sampler=sampler), **SMALL)
    obs = np.stack([model.observation_space.sample() for _ in range(4)])
    state = th.get_rng_state()
    expected, _ = model.predict(obs, deterministic=True)
    assert th.equal(th.get_rng_state(), state)
    for seed in range(3):
        th.manual_seed(seed)
        np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], expected)
    np.testing.assert_array_equal(model.policy.predict(obs, deterministic=True)[0], expected)
    np.testing.assert_array_equal(model.policy.actor.predict(obs, deterministic=True)[0], expected)
    # One observation or many, the answer is the same
    alone = np.stack([model.predict(row, deterministic=True)[0] for row in obs])
    np.testing.assert_allclose(alone, expected, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_random_prediction_follows_the_seed(sampler):
    model = QSM("MlpPolicy", "Pendulum-v1", seed=0, policy_kwargs=dict(sampler=sampler), **SMALL)
    obs = np.zeros((4, 3), dtype=np.float32)
    draws = []
    for seed in (0, 0, 1):
        th.manual_seed(seed)
        draws.append(model.predict(obs)[0])
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])
    assert len(np.unique(draws[0])) > 1  # four draws for one observation


def test_prediction_does_not_touch_the_weights():
    model = trained()
    before = {name: value.clone() for name, value in state(model).items()}
    model.predict(np.zeros((5, 3), dtype=np.float32))
    assert all(th.equal(value, before[name]) for name, value in state(model).items())
