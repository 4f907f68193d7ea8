"""
Reverse chains against known laws.

A chain whose denoiser is affine and whose clip does not bind is an affine map of its noise. Feeding it zero and each unit
vector of noise in one batch gives the exact mean and standard deviation of its samples: no Monte Carlo, tight tolerances.
"""

import math

import numpy as np
import pytest
import torch as th

from sb3_qsm import QSM
from sb3_qsm.losses import SCORE_TARGETS
from sb3_qsm.published import running_clip_sample
from sb3_qsm.samplers import SAMPLERS, ddim_sample, ddpm_sample
from sb3_qsm.schedules import SCHEDULES, geometric_ratios, vp_ratios

MEAN, STD = 0.4, 0.1
CHAINS = SAMPLERS | {"running_clip": running_clip_sample}
BY_HAND = [0.75, math.sqrt(5.25)]  # betas 0.36, 0.75; alpha 0.8, 0.4; sigma 0.6, sqrt(0.84)


def start_of(ratios, noise):
    """Start of a chain: as wide as clean actions of size one under the last level's noise."""
    return math.sqrt(1 + ratios[-1] ** 2) * noise


def unit_noise(ratios):
    """Start and noise of a chain, in rows: none, a unit at the start, a unit at each step."""
    noise = th.eye(len(ratios) + 2)[1:, :, None]
    return start_of(ratios, noise[0]), noise[1:]


def moments(rows):
    """Mean and standard deviation of an affine map, from its values on :func:`unit_noise`."""
    rows = rows[:, 0].double()
    return rows[0].item(), (rows[1:] - rows[0]).norm().item()


def gaussian_denoiser(ratios, certain=True):
    """Exact E[a_0 | u] for a_0 ~ N(MEAN, STD^2), with or without its variance."""

    def denoise(u, t):
        total = ratios[t] ** 2 + STD**2
        variance = 0.0 if certain else th.full_like(u, ratios[t] ** 2 * STD**2 / total)
        return (ratios[t] ** 2 * MEAN + STD**2 * u) / total, variance

    return denoise


@pytest.mark.parametrize("name", CHAINS)
def test_gaussian_law(name):
    errors = []
    for n_steps in (10, 50, 250):
        ratios = vp_ratios(n_steps).tolist()
        mean, std = moments(CHAINS[name](gaussian_denoiser(ratios), ratios, *unit_noise(ratios), math.inf))
        # The chain starts around 0 in place of MEAN: a deterministic chain keeps that for ever
        assert mean == pytest.approx(MEAN, abs=4e-3)
        errors.append(abs(std - STD))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.011


@pytest.mark.parametrize("n_steps", [1, 2, 3, 20])
def test_a_chain_that_knows_the_variance_draws_exactly(n_steps):
    """However few its steps: for a normal policy each step of the reverse chain is normal."""
    ratios = geometric_ratios(n_steps).tolist()
    _, noise = unit_noise(ratios)
    start = MEAN + math.sqrt(ratios[-1] ** 2 + STD**2) * th.eye(n_steps + 2)[1][:, None]
    for certain in (False, True):
        mean, std = moments(ddpm_sample(gaussian_denoiser(ratios, certain), ratios, start, noise, math.inf))
        assert mean == pytest.approx(MEAN, abs=1e-6)
        assert std < 0.9 * STD if certain else std == pytest.approx(STD, rel=1e-5)


def test_gaussian_law_by_sampling():
    ratios = vp_ratios(100).tolist()
    noise = th.randn((101, 20_000, 2), generator=th.Generator().manual_seed(0))
    actions = ddpm_sample(gaussian_denoiser(ratios), ratios, start_of(ratios, noise[0]), noise[1:])
    np.testing.assert_allclose(actions.mean(dim=0), [MEAN, MEAN], atol=5 * STD / math.sqrt(20_000))
    np.testing.assert_allclose(actions.std(dim=0), [0.082, 0.082], rtol=0.04)  # 0.0824 by the exact law above


@pytest.mark.parametrize("sampler", [ddpm_sample, ddim_sample])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_level_has_the_forward_law(sampler, schedule):
    """When the clean action is known, the chain at level t must be N(a_0, r_t^2), as in the forward process."""
    ratios = SCHEDULES[schedule](7).tolist()
    _, noise = unit_noise(ratios)
    start = MEAN + ratios[-1] * th.eye(9)[1][:, None]
    seen = []

    def denoise(u, t):
        seen.append((t, *moments(u)))
        return th.full_like(u, MEAN), 0.0

    sampler(denoise, ratios, start, noise)
    np.testing.assert_allclose(seen, [(t, MEAN, ratios[t]) for t in reversed(range(7))], rtol=1e-5)


@pytest.mark.parametrize("name", CHAINS)
def test_denoiser_sees_every_level_once(name):
    ratios = vp_ratios(4).tolist()
    levels = []
    CHAINS[name](lambda u, t: levels.append(t) or (u, 0.0), ratios, *unit_noise(ratios))
    assert levels == [3, 2, 1, 0] and all(type(t) is int for t in levels)


def test_ddpm_step_by_hand():
    # Posterior of Ho et al., Eq. 7, from level 1 (abar 0.16, beta 0.75) to level 0 (abar 0.64), a_1 = 0.5, guess 0.3:
    # mean = sqrt(0.64) * 0.75 / 0.84 * 0.3 + sqrt(0.25) * 0.36 / 0.84 * 0.5, variance = 0.36 / 0.84 * 0.75
    guesses = {1: 0.3, 0: 0.9}
    seen = {}

    def denoise(u, t):
        seen[t] = u.item()
        return th.full_like(u, guesses[t]), 0.0

    action = ddpm_sample(denoise, BY_HAND, th.tensor([[0.5 / 0.4]]), th.tensor([[[7.0]], [[2.0]]]))
    assert seen[1] == pytest.approx(0.5 / 0.4)
    assert 0.8 * seen[0] == pytest.approx(0.214285714 + 0.107142857 + 2 * math.sqrt(0.321428571), rel=1e-6)
    assert action.item() == pytest.approx(0.9)  # the last step adds no noise


def test_ddpm_step_with_variance_by_hand():
    # As above; a variance of 0.04 of the guess adds (sqrt(0.64) * 0.75 / 0.84)^2 * 0.04 at level 1, and all of it at level 0
    seen = {}

    def denoise(u, t):
        seen[t] = u.item()
        return th.full_like(u, 0.3), th.full_like(u, 0.04)

    action = ddpm_sample(denoise, BY_HAND, th.tensor([[0.5 / 0.4]]), th.tensor([[[-2.0]], [[2.0]]]))
    std = math.sqrt(0.321428571 + 0.714285714**2 * 0.04)
    assert 0.8 * seen[0] == pytest.approx(0.214285714 + 0.107142857 + 2 * std, rel=1e-6)
    assert action.item() == pytest.approx(0.3 - 2 * 0.2)


def test_ddim_step_by_hand():
    # noise = (0.5 - 0.4 * 0.3) / sqrt(0.84), a_0 = 0.8 * 0.3 + 0.6 * noise
    seen = []
    ddim_sample(
        lambda u, t: seen.append(u.item()) or (th.full_like(u, 0.3), 0.0),
        BY_HAND,
        th.tensor([[0.5 / 0.4]]),
        th.full((2, 1, 1), 7.0),
    )
    assert [0.4 * seen[0], 0.8 * seen[1]] == pytest.approx([0.5, 0.24 + 0.6 * 0.38 / math.sqrt(0.84)], rel=1e-6)


@pytest.mark.parametrize("noise, clipped", [(-0.2, False), (2.0, True)])
def test_running_clip_by_hand(noise, clipped):
    # Level 1: e = (0.5 - 0.12) / sqrt(0.84), a = (0.5 - 0.75 / sqrt(0.84) e) / 0.5 + sqrt(0.75) noise
    middle = (0.5 - 0.75 * 0.38 / 0.84) / 0.5 + math.sqrt(0.75) * noise
    assert (abs(middle) > 1) == clipped
    middle = min(max(middle, -1), 1)
    # Level 0: beta = sigma^2 = 0.36, no noise: a = (middle - (middle - 0.8 * 0.3)) / 0.8 = 0.3
    seen = []
    action = running_clip_sample(
        lambda u, t: seen.append(u.item()) or (th.full_like(u, 0.3), 0.0),
        BY_HAND,
        th.tensor([[0.5 / 0.4]]),
        th.tensor([[[7.0]], [[noise]]]),
    )
    assert [0.4 * seen[0], 0.8 * seen[1]] == pytest.approx([0.5, middle], rel=1e-5)
    assert action.item() == pytest.approx(0.3, rel=1e-5)


@pytest.mark.parametrize("name", CHAINS)
def test_what_is_clipped(name):
    """DDPM and DDIM clip the guess and let u run; the authors' chain lets the guess run and clips a_t."""
    ratios = vp_ratios(6).tolist()
    start, noise = start_of(ratios, th.full((1, 1), 3.0)), th.full((6, 1, 1), 3.0)

    def chain(guess):
        seen = []

        def denoise(u, t):
            seen.append(u.item() / math.sqrt(1 + ratios[t] ** 2))
            return th.full_like(u, guess), 0.0

        assert CHAINS[name](denoise, ratios, start, noise, 0.5).item() == 0.5
        return seen[1:]

    running = chain(5.0)
    if name == "running_clip":
        assert running == pytest.approx([0.5] * 5)
    else:
        assert running == chain(0.5) and max(running) > 0.5


@pytest.mark.parametrize("name", CHAINS)
def test_noise_is_an_argument(name):
    ratios, sample = geometric_ratios(6).tolist(), CHAINS[name]
    noise = th.randn((7, 3, 2), generator=th.Generator().manual_seed(0))
    state = th.get_rng_state()
    first, second = (sample(gaussian_denoiser(ratios), ratios, noise[0], noise[1:]) for _ in range(2))
    assert th.equal(th.get_rng_state(), state) and th.equal(first, second)
    # DDIM takes all its randomness from the start
    other = sample(gaussian_denoiser(ratios), ratios, noise[0], th.zeros_like(noise[1:]))
    assert th.equal(first, other) == (name == "ddim")


def chain_mean(score_target, optimum, sign):
    """Mean of the DDPM chain when the denoiser fits ``sign`` times the target of Q = -|a - optimum|^2 / 2 exactly."""
    schedule, ent_coef = {"box": (geometric_ratios, 0.03), "published": (vp_ratios, 0.3)}[score_target]
    ratios = schedule(10).tolist()

    def q_fn(actions):
        return -0.5 * sign * (actions - th.tensor(optimum)).pow(2).sum(dim=1, keepdim=True)

    def denoise(u, t):
        answer = th.zeros_like(u)
        for _ in range(60):  # towards the answer that is its own target
            level = u, th.full((len(u), 1), ratios[t]), th.tensor(ent_coef)
            target, _ = SCORE_TARGETS[score_target](q_fn, answer, 0 * answer, *level)
            answer = answer.lerp(target, 0.1)
        return answer, 0.0

    noise = th.randn((11, 2000, len(optimum)), generator=th.Generator().manual_seed(0))
    return ddpm_sample(denoise, ratios, start_of(ratios, noise[0]), noise[1:]).mean(dim=0)


@pytest.mark.parametrize("score_target", ["box", "published"])
@pytest.mark.parametrize("optimum", [[0.5], [-0.5], [0.5, -0.3]])
def test_quadratic_q(score_target, optimum):
    np.testing.assert_allclose(chain_mean(score_target, optimum, sign=1), optimum, atol=0.05)
    away = chain_mean(score_target, optimum, sign=-1)
    assert (away * th.tensor(optimum) < 0).all()


@pytest.mark.parametrize("average", [False, True])
def test_trajectory(average):
    """What a chain passes through: its start, each level's noisy action, and the action that ``sample`` returns."""
    model = QSM("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(sampler="ddim", net_arch=[16]), learning_starts=20, seed=0)
    actor = model.learn(30).actor
    obs, noise = th.randn(50, 3), th.randn(7, 50, 1)
    with th.no_grad():
        points = actor.trajectory(obs, noise, average)
        assert points.shape == (7, 50, 1) and th.equal(points[0], actor.start_std * noise[0])
        assert th.equal(points[-1], actor.sample(obs, noise, average))
        denoise = actor.denoise_fn(obs, average)
        for passed, t in zip(range(5), range(5, 0, -1), strict=True):
            guess = denoise(points[passed], t)[0].clamp(-1, 1)
            ratio, smaller = actor.levels[t], actor.levels[t - 1]
            th.testing.assert_close(points[passed + 1], guess + smaller / ratio * (points[passed] - guess))
