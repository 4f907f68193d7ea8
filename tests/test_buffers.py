"""Returns over several steps: as SB3's where transitions follow each other, and never over those that do not."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common import buffers
from stable_baselines3.common.utils import set_random_seed

from sb3_qsm import QSM
from sb3_qsm.buffers import NStepDictReplayBuffer, NStepReplayBuffer

PARTS = {"angle": slice(0, 1), "speed": slice(1, 3)}


def box(size):
    return spaces.Box(-10, 10, (size,), np.float32)


def parts(observations):
    return {name: observations[..., part] for name, part in PARTS.items()}


def test_same_samples_as_sb3s():
    """Of transitions that follow each other: for one vector, and for its parts in a dictionary."""
    kwargs = dict(buffer_size=40, action_space=box(1), device="cpu", n_envs=2, n_steps=3, gamma=0.9)
    theirs = buffers.NStepReplayBuffer(observation_space=box(3), **kwargs)
    plain = NStepReplayBuffer(observation_space=box(3), **kwargs)
    split = NStepDictReplayBuffer(observation_space=spaces.Dict(angle=box(1), speed=box(2)), **kwargs)
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(2, 3))
    for _ in range(27):  # the ring of 20 rows is written over
        next_obs = rng.normal(size=(2, 3))
        action, reward = rng.normal(size=(2, 1)), rng.normal(size=2)
        dones, timeouts = rng.random((2, 2)) < 0.2
        infos = [{"TimeLimit.truncated": timeout} for timeout in timeouts]
        for buffer in (theirs, plain):
            buffer.add(obs, next_obs, action, reward, dones | timeouts, infos)
        split.add(parts(obs), parts(next_obs), action, reward, dones | timeouts, infos)
        obs = np.where((dones | timeouts)[:, None], rng.normal(size=(2, 3)), next_obs)

    samples = []
    for buffer in (theirs, plain, split):
        set_random_seed(0)
        samples.append(buffer.sample(100))
    wanted, same, got = samples
    for name in ("observations", "next_observations"):
        np.testing.assert_array_equal(getattr(same, name), getattr(wanted, name))
        for key, value in parts(getattr(wanted, name)).items():
            np.testing.assert_array_equal(getattr(got, name)[key], value)
    for name in ("actions", "rewards", "dones", "discounts"):
        np.testing.assert_array_equal(getattr(same, name), getattr(wanted, name))
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name))
    assert len(set(wanted.discounts.flatten().tolist())) == 3 and 0 < wanted.dones.mean() < 1


@pytest.mark.parametrize("dictionary", [False, True])
def test_returns_end_where_the_next_transition_does_not_follow(dictionary):
    """In the environment where it does not, and as one that ran out of time, unless its episode has ended in another way."""
    space = spaces.Dict(angle=box(1), speed=box(2)) if dictionary else box(3)
    buffer = (NStepDictReplayBuffer if dictionary else NStepReplayBuffer)(12, space, box(1), device="cpu", n_envs=3, n_steps=3)

    def add(obs, next_obs, dones):
        both = [parts(array) if dictionary else array for array in (obs, next_obs)]
        buffer.add(*both, np.zeros((3, 1)), np.zeros(3), np.array(dones), [{}] * 3)

    zeros, ones = np.zeros((3, 3)), np.ones((3, 3))
    add(zeros, ones, [False, False, True])
    last_differs = ones.copy()
    last_differs[1, 2] = 1.5
    last_differs[2] = 7.0
    add(last_differs, zeros, [False] * 3)
    add(zeros, ones, [False] * 3)
    add(zeros, zeros, [False] * 3)
    add(zeros, zeros, [False] * 3)  # over the first row, whose neighbour is the last
    assert buffer.timeouts.tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 1], [0, 0, 0]]
    buffer = (NStepDictReplayBuffer if dictionary else NStepReplayBuffer)(12, space, box(1), device="cpu", n_envs=3, n_steps=3)
    add(zeros, ones, [False, False, True])
    add(last_differs, zeros, [False] * 3)
    assert buffer.timeouts[0].tolist() == [0, 1, 0] and buffer.dones[0].tolist() == [0, 0, 1]


class Counting(gym.Env):
    """Observation and reward count the steps of all episodes, which never end by themselves; a reset counts a thousand."""

    observation_space = spaces.Box(0, 1e6, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    count = 0

    def reset(self, *, seed=None, options=None):
        self.count += 1000
        return np.full(1, self.count, np.float32), {}

    def step(self, action):
        self.count += 1
        return np.full(1, self.count, np.float32), float(self.count), False, False, {}


def build(env=None, **kwargs):
    small = dict(learning_starts=100, buffer_size=100, policy_kwargs=dict(net_arch=[8]), device="cpu")
    return QSM("MlpPolicy", env or Counting(), **small | kwargs)


@pytest.mark.parametrize("reset", [True, False])
def test_returns_end_where_the_environment_is_reset(reset):
    """A second call of learn() begins a new episode, unless the time goes on: no return of three steps reaches into it."""
    model = build(gamma=0.5)
    model.learn(10)
    model.learn(10, reset_num_timesteps=reset)
    samples = model.replay_buffer._get_samples(np.arange(7, 12))
    nexts = [1010, 1010, 1010, 2013, 2014] if reset else [1010, 1011, 1012, 1013, 1014]
    assert samples.next_observations.ravel().tolist() == nexts
    assert samples.discounts.ravel().tolist() == ([0.125, 0.25, 0.5, 0.125, 0.125] if reset else [0.125] * 5)
    first = 1008 + 1009 / 2 + 1010 / 4
    assert samples.rewards[0].item() == first and (samples.dones == 0).all()


def test_returns_end_where_a_loaded_buffer_ends(tmp_path):
    first, second = build().learn(5), build().learn(7)
    first.save_replay_buffer(tmp_path / "buffer")
    second.load_replay_buffer(tmp_path / "buffer")
    second.learn(5, reset_num_timesteps=False)  # goes on in the midst of its own episode, from 1007
    nexts = second.replay_buffer._get_samples(np.arange(2, 7)).next_observations
    assert nexts.ravel().tolist() == [1005, 1005, 1005, 1010, 1011]


def test_returns_over_shuffled_transitions():
    buffer = build().replay_buffer
    for k in range(10):  # observation k leads to k + 0.5, which is the start of no other transition
        obs, next_obs = np.full((1, 1), k, np.float32), np.full((1, 1), k + 0.5, np.float32)
        buffer.add(obs, next_obs, np.zeros((1, 1)), np.array([10.0**k]), np.array([False]), [{}])
    samples = buffer._get_samples(np.arange(9))
    assert samples.next_observations.ravel().tolist() == [k + 0.5 for k in range(9)]
    assert samples.rewards.ravel().tolist() == [10.0**k for k in range(9)] and (samples.dones == 0).all()


def test_gamma_follows_the_model(tmp_path):
    """Given to load(), or set: also the buffer's, unless the user gave that its own."""
    model = build(learning_starts=0, batch_size=4, gamma=0.9).learn(10)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = QSM.load(tmp_path / "model", env=model.get_env(), gamma=0.5)
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert loaded.replay_buffer._get_samples(np.arange(3)).discounts.ravel().tolist() == [0.125] * 3
    model.gamma = 0.25
    model.learn(1, reset_num_timesteps=False)
    assert model.replay_buffer.gamma == 0.25
    own = build(learning_starts=0, batch_size=4, gamma=0.9, replay_buffer_kwargs=dict(n_steps=5, gamma=0.8)).learn(2)
    assert (own.replay_buffer.n_steps, own.replay_buffer.gamma) == (5, 0.8)


def test_default_is_three_steps_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # SB3 would take the buffer's class for the user's
        buffer = build().replay_buffer
    assert type(buffer) is NStepReplayBuffer and buffer.n_steps == 3
