"""
What the default's score target makes of a Q that is known, beside the exact policy exp(Q / lambda).

One action dimension and no neural network: the denoiser is a table over noisy actions, moved towards its own target until it
stays. What is left is the error of the target and of the chain.
"""

import numpy as np
import pytest
import torch as th

from sb3_qsm.losses import box_score_target, heights_score_target
from sb3_qsm.samplers import ddpm_sample
from sb3_qsm.schedules import geometric_ratios

N_ACTIONS = 20_000


def bell(actions, centre, height=1.0):
    return height * th.exp(-0.5 * ((actions - centre) / 0.25) ** 2)


LANDSCAPES = {
    "flat": lambda a: 0 * a,
    "linear": lambda a: a,
    "parabola": lambda a: -4 * (a - 0.3) ** 2,
    "two bells": lambda a: bell(a, -0.6) + bell(a, 0.6),
}


def implied_variance(grid, table, ratio):
    """What a denoiser's mean implies of its variance; over ten points, for a mean that is noisy; shape of ``table``."""
    width = 5
    slopes = th.zeros_like(table)
    slopes[width:-width] = (table[2 * width :] - table[: -2 * width]) / (grid[2 * width :] - grid[: -2 * width])
    return (ratio**2 * slopes).minimum(1 - table.clamp(-1, 1) ** 2).clamp(min=0)


def learnt_actions(q_fn, ent_coef, ratios, learn_variance=False, heights=False):
    """Actions of the chain whose denoiser answers its own target, and the variance that follows, shape (N_ACTIONS, 1)."""
    th.manual_seed(0)
    grids = [th.linspace(-4, 4, 801)[:, None] * np.sqrt(1 + ratio**2) for ratio in ratios]  # of u = a_0 + r z
    tables = [grid.clamp(-1, 1) for grid in grids]
    for grid, table, ratio in zip(grids, tables, ratios, strict=True):
        if heights:
            means = []
            for _ in range(300):  # each target is a draw
                answer = table, implied_variance(grid, table, ratio)
                target, _ = heights_score_target(q_fn, *answer, grid, th.full_like(grid, ratio), th.tensor(ent_coef))
                table += 0.1 * (target - table)
                means.append(table.clone())
            table.copy_(th.stack(means[150:]).mean(dim=0))
            continue
        for _ in range(40):
            target, _ = box_score_target(q_fn, table, 0 * table, grid, th.tensor(ratio), th.tensor(ent_coef))
            table += 0.3 * (target - table)

    def look_up(u, grid, table):
        return th.as_tensor(np.interp(u.numpy(), grid[:, 0].numpy(), table[:, 0].numpy()), dtype=th.float32)

    def denoise(u, t):
        grid, table = grids[t], tables[t]
        variance = implied_variance(grid, table, ratios[t])
        return look_up(u, grid, table), look_up(u, grid, variance) if learn_variance else 0.0

    th.manual_seed(0)
    start = np.sqrt(1 + ratios[-1] ** 2) * th.randn(N_ACTIONS, 1)
    return ddpm_sample(denoise, ratios, start, th.randn(len(ratios), N_ACTIONS, 1))


def exact_moments(q_fn, ent_coef):
    """Mean and standard deviation of exp(Q / lambda) on [-1, 1], by quadrature."""
    grid = th.linspace(-1, 1, 4001)
    density = th.softmax(q_fn(grid) / ent_coef, dim=0)
    mean = (density * grid).sum()
    return mean.item(), (density * (grid - mean) ** 2).sum().sqrt().item()


def distance(actions, q_fn, ent_coef):
    """How far drawn actions have to move, on average, to be those of exp(Q / lambda) on [-1, 1] (Wasserstein-1)."""
    grid = th.linspace(-1, 1, 4001)
    shares = th.softmax(q_fn(grid) / ent_coef, dim=0).cumsum(dim=0)
    exact = np.interp((np.arange(N_ACTIONS) + 0.5) / N_ACTIONS, shares.numpy(), grid.numpy())
    return np.abs(np.sort(actions[:, 0].numpy()) - exact).mean()


@pytest.mark.parametrize("learn_variance", [False, True])
@pytest.mark.parametrize("landscape", LANDSCAPES)
def test_long_chain_draws_from_the_boltzmann_policy(landscape, learn_variance):
    q_fn, ent_coef = LANDSCAPES[landscape], 0.2
    actions = learnt_actions(q_fn, ent_coef, geometric_ratios(100, 0.01, 20.0).tolist(), learn_variance)
    mean, std = exact_moments(q_fn, ent_coef)
    assert actions.mean().item() == pytest.approx(mean, abs=0.015)
    assert actions.std().item() == pytest.approx(std, rel=0.08)


@pytest.mark.parametrize("ent_coef", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("landscape", LANDSCAPES)
def test_six_steps_draw_nearly_from_the_boltzmann_policy(landscape, ent_coef):
    """With a variance; without one, as by default, they are narrow, and a good deal further off."""
    q_fn, ratios = LANDSCAPES[landscape], geometric_ratios(6).tolist()
    actions = learnt_actions(q_fn, ent_coef, ratios, learn_variance=True)
    mean, std = exact_moments(q_fn, ent_coef)
    assert actions.mean().item() == pytest.approx(mean, abs=0.03)
    sharp = landscape in ("linear", "parabola") and ent_coef == 0.05  # finer than the finest level
    assert actions.std().item() == pytest.approx(std, abs=0.03 if sharp else 0.1 * std)
    certain = learnt_actions(q_fn, ent_coef, ratios)
    assert certain.mean().item() == pytest.approx(mean, abs=0.015)
    assert 0.5 * std < certain.std().item() < 1.05 * std
    assert distance(actions, q_fn, ent_coef) < 0.7 * distance(certain, q_fn, ent_coef)


@pytest.mark.parametrize("learn_variance", [False, True])
def test_both_of_two_bells_are_kept(learn_variance):
    actions = learnt_actions(LANDSCAPES["two bells"], 0.05, geometric_ratios(6).tolist(), learn_variance)
    for centre in (-0.6, 0.6):
        assert ((actions - centre).abs() < 0.25).float().mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("ent_coef", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("landscape", [*LANDSCAPES, "unequal bells"])
def test_heights_give_the_boltzmann_policy(landscape, ent_coef):
    """With draws from the denoiser's own posterior; slopes alone visit a summit half as high nearly as often."""

    def unequal(actions):
        return bell(actions, -0.6, height=0.5) + bell(actions, 0.6)

    q_fn, ratios = LANDSCAPES.get(landscape, unequal), geometric_ratios(6).tolist()
    actions = learnt_actions(q_fn, ent_coef, ratios, learn_variance=True, heights=True)
    grid = th.linspace(-1, 1, 4001)
    share = th.softmax(q_fn(grid) / ent_coef, dim=0)[grid > 0].sum().item()
    assert (actions > 0).float().mean().item() == pytest.approx(share, abs=0.05)
    assert distance(actions, q_fn, ent_coef) < 0.05
    if landscape != "unequal bells":
        mean, std = exact_moments(q_fn, ent_coef)
        assert actions.mean().item() == pytest.approx(mean, abs=0.03)
        assert actions.std().item() == pytest.approx(std, rel=0.1)
    elif ent_coef < 1:
        slopes = (learnt_actions(q_fn, ent_coef, ratios, learn_variance=True) > 0).float().mean().item()
        assert slopes < 0.6 < 0.8 < share
