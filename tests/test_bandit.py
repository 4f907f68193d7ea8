"""What a diffusion policy is for: one state, several equal optima, and all of them are visited."""

import numpy as np
import pytest

from benchmarks.environments import Bandit
from sb3_qsm import QSM

TWO = [[-0.6], [0.6]]
FOUR = [[-0.6, -0.6], [-0.6, 0.6], [0.6, -0.6], [0.6, 0.6]]


@pytest.mark.parametrize("optima, share", [(TWO, 0.2), (FOUR, 0.1)])
def test_every_mode_is_visited(optima, share):
    """With plain critics, for there is no next state to foretell, and a policy sharp enough to tell modes apart."""
    model = QSM(
        "MlpPolicy",
        Bandit(optima),
        learning_rate=1e-3,
        learning_starts=500,
        buffer_size=5000,
        batch_size=128,
        train_freq=1,
        policy_kwargs=dict(net_arch=[64, 64], embedding_dim=None, layer_norm=True),
        target_entropy=-len(optima[0]),
        seed=0,
        device="cpu",
    )
    model.learn(5000)
    actions, _ = model.predict(np.zeros((500, 1), np.float32))
    distances = np.linalg.norm(actions[:, None] - np.array(optima), axis=2)
    near = distances.min(axis=1) < 0.35
    assert near.mean() > 0.85
    shares = np.bincount(distances.argmin(axis=1)[near], minlength=len(optima)) / 500
    assert (shares > share).all(), shares
