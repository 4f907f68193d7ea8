"""What a diffusion policy is for: one state, several equal optima, and all of them are visited."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from sb3_qsm import QSM


class Bandit(gym.Env):
    """One state, one step: the reward falls with the distance to the nearest optimum."""

    observation_space = spaces.Box(0, 1, (1,), np.float32)

    def __init__(self, optima):
        self.optima = np.array(optima)
        self.action_space = spaces.Box(-1, 1, (self.optima.shape[1],), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        distance = np.linalg.norm(action - self.optima, axis=1).min()
        return np.zeros(1, np.float32), -4 * float(distance) ** 2, True, False, {}


TWO = [[-0.6], [0.6]]
FOUR = [[-0.6, -0.6], [-0.6, 0.6], [0.6, -0.6], [0.6, 0.6]]


@pytest.mark.parametrize("optima, share", [(TWO, 0.2), (FOUR, 0.1)])
def test_every_mode_is_visited(optima, share):
    model = QSM(
        "MlpPolicy",
        Bandit(optima),
        learning_rate=1e-3,
        learning_starts=500,
        buffer_size=5000,
        batch_size=128,
        train_freq=1,
        policy_kwargs=dict(net_arch=[64, 64]),
        seed=0,
        device="cpu",
    )
    model.learn(2500)
    actions, _ = model.predict(np.zeros((500, 1), np.float32))
    distances = np.linalg.norm(actions[:, None] - np.array(optima), axis=2)
    near = distances.min(axis=1) < 0.35
    assert near.mean() > 0.9
    shares = np.bincount(distances.argmin(axis=1)[near], minlength=len(optima)) / 500
    assert (shares > share).all(), shares
