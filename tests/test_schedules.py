"""Noise levels against literal numbers, and the forward process against its moments."""

import math

import numpy as np
import pytest
import torch as th

from sb3_qsm.schedules import BETA_SCHEDULES, NoiseSchedule, box_betas, cosine_betas, linear_betas, vp_betas


def test_vp_betas():
    # Printed by the QSM authors' code (repository score_matching_rl, commit 2e77893) for T = 5
    authors = [0.19587457, 0.4588182, 0.63578105, 0.75487816, 0.8350314]
    np.testing.assert_allclose(vp_betas(5), authors, rtol=1e-6)


def test_cosine_betas():
    # Nichol and Dhariwal, Eq. 17, for T = 4: abar = f(u) / f(0), f(u) = cos((u + 0.008) / 1.008 * pi / 2)^2,
    # f = 0.99984459, 0.84688050, 0.49376684, 0.14424962, 0 at u = 0, 1/4, 1/2, 3/4, 1, and betas end at 0.999
    f = [0.99984459, 0.84688050, 0.49376684, 0.14424962]
    np.testing.assert_allclose(cosine_betas(4), [1 - f[1] / f[0], 1 - f[2] / f[1], 1 - f[3] / f[2], 0.999], rtol=1e-6)


def test_linear_betas():
    betas = linear_betas(1000)  # the chain of Ho et al., section 4
    np.testing.assert_allclose(betas[[0, 1, 999]], [1e-4, 1e-4 + 0.0199 / 999, 0.02], rtol=1e-12)
    # Ten times fewer steps, ten times the betas
    np.testing.assert_allclose(linear_betas(100)[[0, 99]], [1e-3, 0.2], rtol=1e-12)
    assert linear_betas(10).max() == 0.999


def test_box_betas():
    # Geometric from 0.25 to 2.5, ratio 10^(1/5) = 1.58489319
    schedule = NoiseSchedule(box_betas(6, ratio_min=0.25))
    ratios = [0.25, 0.39622330, 0.62797161, 0.99526793, 1.57739336, 2.5]
    np.testing.assert_allclose(schedule.sigma / schedule.alpha, ratios, rtol=1e-6)
    # 1 - abar_0 = r^2 / (1 + r^2) = 0.0625 / 1.0625
    np.testing.assert_allclose(schedule.betas[0], 1 / 17, rtol=1e-6)
    # By default from 0.1; 0.5 is the geometric mean
    schedule = NoiseSchedule(box_betas(3))
    np.testing.assert_allclose(schedule.sigma / schedule.alpha, [0.1, 0.5, 2.5], rtol=1e-6)
    # A single step comes from noise: with r = 0.1 it could move a draw from N(0, 1) by no more than 4 r
    schedule = NoiseSchedule(box_betas(1))
    np.testing.assert_allclose(schedule.sigma / schedule.alpha, [2.5], rtol=1e-6)


def test_levels_by_hand():
    schedule = NoiseSchedule(th.tensor([0.1, 0.5, 0.75]))
    abar = np.array([0.9, 0.45, 0.1125])
    np.testing.assert_allclose(schedule.alpha, np.sqrt(abar), rtol=1e-6)
    np.testing.assert_allclose(schedule.sigma, np.sqrt(1 - abar), rtol=1e-6)
    np.testing.assert_allclose(schedule.levels, np.transpose([[0.1, 0.5, 0.75], np.sqrt(abar), np.sqrt(1 - abar)]), rtol=1e-6)
    assert schedule.n_steps == 3


def test_posterior_by_hand():
    # Bayes for normals: a_1 ~ N(sqrt(0.9) a_0, 0.1) and a_2 | a_1 ~ N(sqrt(0.5) a_1, 0.5) have precisions 10 and 1,
    # mean (10 sqrt(0.9) a_0 + sqrt(0.5) / 0.5 a_2) / 11 and variance 1 / 11; before level 0 there is a_0 itself
    of_a_0, of_a_t, std = np.transpose(NoiseSchedule(th.tensor([0.1, 0.5])).posterior)
    np.testing.assert_allclose(of_a_0.astype(float), [1, 10 * math.sqrt(0.9) / 11], rtol=1e-6)
    np.testing.assert_allclose(of_a_t.astype(float), [0, 2 * math.sqrt(0.5) / 11], rtol=1e-6)
    np.testing.assert_allclose(std.astype(float), [0, math.sqrt(1 / 11)], rtol=1e-6)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
@pytest.mark.parametrize("n_steps", [1, 2, 5, 10, 50, 1000])
def test_every_schedule(name, n_steps):
    betas = BETA_SCHEDULES[name](n_steps)
    assert betas.shape == (n_steps,)
    schedule = NoiseSchedule(betas)
    assert (schedule.alpha.diff() < 0).all() and (schedule.sigma.diff() >= 0).all()
    assert 0 < schedule.alpha.min() and schedule.alpha.max() < 1 and 0 < schedule.sigma.min()
    np.testing.assert_allclose(schedule.alpha**2 + schedule.sigma**2, 1, rtol=1e-6)


@pytest.mark.parametrize("name, alpha_bound", [("vp", 0.1), ("cosine", 0.03), ("linear", 0.03)])
def test_ends_in_noise(name, alpha_bound):
    assert NoiseSchedule(BETA_SCHEDULES[name](20)).alpha[-1] < alpha_bound


def test_buffers_are_float32_and_not_saved():
    schedule = NoiseSchedule(vp_betas(5))
    assert {buffer.dtype for buffer in schedule.buffers()} == {th.float32}
    assert len(list(schedule.buffers())) == 3 and schedule.state_dict() == {}


def test_add_noise_by_hand():
    schedule = NoiseSchedule(th.tensor([0.36, 0.75]))  # alpha 0.8, 0.4; sigma 0.6, sqrt(0.84)
    noisy = schedule.add_noise(th.tensor([[1.0, -0.5], [1.0, -0.5]]), th.tensor([[2.0, 0.0], [0.0, -1.0]]), th.tensor([0, 1]))
    np.testing.assert_allclose(noisy, [[0.8 + 1.2, -0.4], [0.4, -0.2 - math.sqrt(0.84)]], rtol=1e-6)


@pytest.mark.parametrize("t", [0, 3, 5])
def test_add_noise_moments(t):
    schedule = NoiseSchedule(box_betas(6, ratio_min=0.25))
    noise = th.randn((100_000, 2), generator=th.Generator().manual_seed(0))
    noisy = schedule.add_noise(th.tensor([[0.7, -0.2]]).expand_as(noise), noise, th.full((100_000,), t))
    ratio = 0.25 * 10 ** (t / 5)
    alpha, sigma = 1 / math.sqrt(1 + ratio**2), ratio / math.sqrt(1 + ratio**2)
    # Five standard errors
    np.testing.assert_allclose(noisy.mean(dim=0), [0.7 * alpha, -0.2 * alpha], atol=5 * sigma / math.sqrt(100_000))
    np.testing.assert_allclose(noisy.std(dim=0), [sigma, sigma], rtol=5 / math.sqrt(200_000))


@pytest.mark.parametrize("betas", [[], [0.0], [1.0], [0.5, 1.5], [-0.1], [math.nan], [[0.1, 0.2]]])
def test_bad_betas(betas):
    with pytest.raises(ValueError, match=r"betas must be a non-empty vector of numbers in \(0, 1\), got \["):
        NoiseSchedule(th.tensor(betas))
