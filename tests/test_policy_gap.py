"""The distance of a policy from the best action of its critics: against a search over all actions."""

import numpy as np
import pytest
import torch as th

from benchmarks.policy_gap import gap
from sb3_qsm import QSM


def test_gap_is_that_of_a_search_over_all_actions():
    model = QSM("MlpPolicy", "Pendulum-v1", ent_coef=0.01, seed=0, device="cpu")
    states = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    obs, grid = th.as_tensor(states), th.linspace(-1, 1, 401)[:, None]

    def q_values(obs, actions):
        with th.no_grad():
            return th.cat(model.critic(obs, actions), dim=1).mean(dim=1)

    best = th.stack([q_values(o.expand(401, -1), grid).max() for o in obs])
    with th.no_grad():
        action = model.actor(obs, deterministic=True)
    th.manual_seed(0)
    found = gap(model, states)
    assert found["deterministic"] == pytest.approx(((best - q_values(obs, action)) / 0.01).mean().item(), rel=0.02)
    assert found["sampled"] > found["ascended"] > -1e-3
    assert found["deterministic"] > 0.5
