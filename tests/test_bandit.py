"""What a diffusion policy is for: one state, several good actions, and all of them are visited as often as they are good."""

import numpy as np
import pytest

from benchmarks.environments import Bandit
from sb3_qsm import QSM

TWO = [[-0.6], [0.6]]
FOUR = [[-0.6, -0.6], [-0.6, 0.6], [0.6, -0.6], [0.6, 0.6]]


def build(env, **kwargs):
    """With plain critics: there is no next state to foretell."""
    return QSM(
        "MlpPolicy",
        env,
        learning_rate=1e-3,
        learning_starts=500,
        buffer_size=5000,
        batch_size=128,
        train_freq=1,
        policy_kwargs=dict(net_arch=[64, 64], embedding_dim=None, layer_norm=True),
        seed=0,
        device="cpu",
        **kwargs,
    )


@pytest.mark.parametrize("optima, share", [(TWO, 0.2), (FOUR, 0.1)])
def test_every_mode_is_visited(optima, share):
    model = build(Bandit(optima)).learn(2500)
    actions, _ = model.predict(np.zeros((500, 1), np.float32))
    distances = np.linalg.norm(actions[:, None] - np.array(optima), axis=2)
    near = distances.min(axis=1) < 0.35
    assert near.mean() > 0.85
    shares = np.bincount(distances.argmin(axis=1)[near], minlength=len(optima)) / 500
    assert (shares > share).all(), shares


class Bells(Bandit):
    """Rewards are bells of different heights."""

    heights = np.array([1.0, 1.0, 0.5, 0.75])

    def reward(self, actions):
        distances = np.linalg.norm(actions[..., None, :] - self.optima, axis=-1)
        return (self.heights * np.exp(-0.5 * (distances / 0.25) ** 2)).max(axis=-1)

    def step(self, action):
        obs, _, terminated, truncated, info = super().step(action)
        return obs, float(self.reward(action)), terminated, truncated, info


def test_heights_get_their_shares():
    """Those of exp(Q / lambda), by quadrature; by slopes, the lowest summit gets 0.15 of the draws for 0.01."""
    env, ent_coef = Bells(FOUR), 0.1
    model = build(env, ent_coef=ent_coef, score_target="heights").learn(5000)
    actions, _ = model.predict(np.zeros((2000, 1), np.float32))
    grid = np.stack(np.meshgrid(*2 * [np.linspace(-1, 1, 201)]), axis=-1).reshape(-1, 2)
    density = np.exp(env.reward(grid) / ent_coef)

    def shares(points, weights=None):
        nearest = np.linalg.norm(points[:, None] - env.optima, axis=2).argmin(axis=1)
        counts = np.bincount(nearest, weights, minlength=4)
        return counts / counts.sum()

    np.testing.assert_allclose(shares(actions), shares(grid, density), atol=0.08)
