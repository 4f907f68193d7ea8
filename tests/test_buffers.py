"""The buffer for dictionaries draws what SB3's draws for the same numbers in one vector; returns that are cut."""

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.utils import set_random_seed

from sb3_qsm.buffers import NStepDictReplayBuffer, cut_returns

PARTS = {"angle": slice(0, 1), "speed": slice(1, 3)}


def box(size):
    return spaces.Box(-10, 10, (size,), np.float32)


def parts(observations):
    return {name: observations[..., part] for name, part in PARTS.items()}


def test_same_samples_as_for_one_vector():
    kwargs = dict(buffer_size=40, action_space=box(1), device="cpu", n_envs=2, n_steps=3, gamma=0.9)
    plain = NStepReplayBuffer(observation_space=box(3), **kwargs)
    split = NStepDictReplayBuffer(observation_space=spaces.Dict(angle=box(1), speed=box(2)), **kwargs)
    rng = np.random.default_rng(0)
    for _ in range(27):  # the ring of 20 rows is written over
        obs, next_obs = rng.normal(size=(2, 2, 3))
        action, reward = rng.normal(size=(2, 1)), rng.normal(size=2)
        dones, timeouts = rng.random((2, 2)) < 0.2
        infos = [{"TimeLimit.truncated": timeout} for timeout in timeouts]
        plain.add(obs, next_obs, action, reward, dones | timeouts, infos)
        split.add(parts(obs), parts(next_obs), action, reward, dones | timeouts, infos)

    set_random_seed(0)
    wanted = plain.sample(100)
    set_random_seed(0)
    got = split.sample(100)
    for name in ("observations", "next_observations"):
        for key, value in parts(getattr(wanted, name)).items():
            np.testing.assert_array_equal(getattr(got, name)[key], value)
    for name in ("actions", "rewards", "dones", "discounts"):
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name))
    assert len(set(wanted.discounts.flatten().tolist())) == 3 and 0 < wanted.dones.mean() < 1


def test_returns_that_are_cut():
    """The newest transition becomes one that ran out of time, unless its episode has ended in another way."""
    buffer = NStepReplayBuffer(12, box(1), box(1), device="cpu", n_envs=3, n_steps=3)
    ends = np.array([False, True, True])  # goes on, terminal, out of time
    infos = [{"TimeLimit.truncated": timeout} for timeout in (False, False, True)]
    for done in (np.zeros(3), ends):
        buffer.add(np.zeros((3, 1)), np.zeros((3, 1)), np.zeros((3, 1)), np.zeros(3), done, infos)
    buffer.timeouts[0] = 0
    cut_returns(buffer)
    assert buffer.timeouts.tolist() == [[0, 0, 0], [1, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert buffer.dones[1].tolist() == [0, 1, 1]
