"""Action boxes of all kinds: the chain works in [-1, 1], the environment sees its own units."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_qsm import QSM

SMALL = dict(learning_starts=10, batch_size=8, buffer_size=200, seed=0, device="cpu", policy_kwargs=dict(net_arch=[16]))


class Reach(gym.Env):
    """Rewards the upper bound of every action; refuses actions outside its box."""

    def __init__(self, action_space, observation_space=None):
        self.action_space = action_space
        self.observation_space = observation_space or spaces.Box(-1, 1, (2,), np.float32)
        self.seen = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.seen.append(action)
        distance = np.abs(np.asarray(action) - self.action_space.high) / (self.action_space.high - self.action_space.low)
        return self.observation_space.sample(), -float(distance.mean()), False, len(self.seen) % 10 == 0, {}


BOXES = {
    "symmetric": spaces.Box(-2, 2, (1,), np.float32),
    "asymmetric": spaces.Box(np.array([-1.0, 0.0, 10.0]), np.array([3.0, 0.5, 1000.0]), dtype=np.float32),
    "float64": spaces.Box(-2, 5, (3,), np.float64),
    "matrix": spaces.Box(-1, 2, (2, 3), np.float32),
    "float64 matrix": spaces.Box(-1, 2, (2, 1, 2), np.float64),
}


@pytest.mark.parametrize("name", BOXES)
def test_action_boxes(name):
    env = Reach(BOXES[name])
    model = QSM("MlpPolicy", env, **SMALL).learn(25)
    assert th.nn.utils.parameters_to_vector(model.policy.parameters()).isfinite().all()
    obs = env.observation_space.sample()
    for deterministic in (True, False):
        action, _ = model.predict(obs, deterministic=deterministic)
        assert env.action_space.contains(action.astype(env.action_space.dtype))
        batch, _ = model.predict(np.stack([obs] * 4), deterministic=deterministic)
        assert batch.shape == (4, *env.action_space.shape)


@pytest.mark.parametrize("name", BOXES)
def test_predictions_are_in_the_units_of_the_box(name):
    """The policy's bounds are the environment's bounds, and its centre the centre of the box."""
    space = BOXES[name]
    model = QSM("MlpPolicy", Reach(space), **SMALL)
    obs = np.zeros((1, 2), dtype=np.float32)
    for scaled, expected in [(-1.0, space.low), (0.0, (space.low + space.high) / 2), (1.0, space.high)]:
        model.actor.sampler = lambda *chain, scaled=scaled: th.full((1, model.actor.action_dim), scaled)
        for predictor in (model, model.policy):
            np.testing.assert_allclose(predictor.predict(obs)[0][0], expected, rtol=1e-6, atol=1e-6)


def test_the_buffer_holds_scaled_actions():
    env = Reach(BOXES["asymmetric"])
    model = QSM("MlpPolicy", env, **SMALL).learn(20)
    stored, seen = model.replay_buffer.actions[:20, 0], np.array(env.seen)
    low, high = env.action_space.low, env.action_space.high
    np.testing.assert_allclose(low + (stored + 1) / 2 * (high - low), seen, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint8])
def test_observations_of_other_types(dtype):
    space = spaces.Box(0, 10, (3,), dtype)
    model = QSM("MlpPolicy", Reach(BOXES["symmetric"], space), **SMALL).learn(15)
    assert {value.dtype for value in model.policy.state_dict().values()} == {th.float32}


@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)])
def test_observations_in_discrete_spaces(space):
    QSM("MlpPolicy", Reach(BOXES["symmetric"], space), **SMALL).learn(15)


@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)])
def test_unsupported_action_spaces(space):
    with pytest.raises(AssertionError, match=r"only supports .*Box.* as action spaces but .* was provided"):
        QSM("MlpPolicy", Reach(space))


@pytest.mark.parametrize("low, high", [(-np.inf, 1.0), (-1.0, np.inf)])
def test_infinite_action_bound(low, high):
    with pytest.raises(AssertionError, match="Continuous action space must have a finite lower and upper bound"):
        QSM("MlpPolicy", Reach(spaces.Box(low, high, (1,), np.float32)))
