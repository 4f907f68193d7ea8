"""Noise-to-signal ratios against literal numbers."""

import math

import numpy as np
import pytest
import torch as th

from sb3_qsm.schedules import SCHEDULES, cosine_ratios, geometric_ratios, linear_ratios, ratios_of_betas, vp_ratios


def betas(ratios):
    """Of the variance-preserving chain with these ratios: 1 - beta_t = abar_t / abar_{t-1}, abar = 1 / (1 + r^2)."""
    alphas_cumprod = 1 / (1 + ratios**2)
    return 1 - alphas_cumprod / th.cat([th.ones(1), alphas_cumprod[:-1]])


def test_ratios_of_betas_by_hand():
    # abar = 0.64, 0.16: r = sqrt(0.36 / 0.64), sqrt(0.84 / 0.16)
    np.testing.assert_allclose(ratios_of_betas(th.tensor([0.36, 0.75])), [0.75, math.sqrt(5.25)], rtol=1e-6)


def test_vp():
    # Printed by the QSM authors' code (repository score_matching_rl, commit 2e77893) for T = 5
    authors = [0.19587457, 0.4588182, 0.63578105, 0.75487816, 0.8350314]
    np.testing.assert_allclose(betas(vp_ratios(5)), authors, rtol=1e-6)


def test_cosine():
    # Nichol and Dhariwal, Eq. 17, for T = 4: abar = f(u) / f(0), f(u) = cos((u + 0.008) / 1.008 * pi / 2)^2,
    # f = 0.99984459, 0.84688050, 0.49376684, 0.14424962, 0 at u = 0, 1/4, 1/2, 3/4, 1, and betas end at 0.999
    f = [0.99984459, 0.84688050, 0.49376684, 0.14424962]
    np.testing.assert_allclose(betas(cosine_ratios(4)), [1 - f[1] / f[0], 1 - f[2] / f[1], 1 - f[3] / f[2], 0.999], rtol=1e-6)


def test_linear():
    # The chain of Ho et al., section 4
    np.testing.assert_allclose(betas(linear_ratios(1000))[[0, 1, 999]], [1e-4, 1e-4 + 0.0199 / 999, 0.02], rtol=1e-6)
    # Ten times fewer steps, ten times the betas
    np.testing.assert_allclose(betas(linear_ratios(100))[[0, 99]], [1e-3, 0.2], rtol=1e-6)
    assert betas(linear_ratios(10)).max() == pytest.approx(0.999)


def test_geometric():
    # From 0.25 to 2.5 in five steps of 10^(1/5) = 1.58489319
    ratios = [0.25, 0.39622330, 0.62797161, 0.99526793, 1.57739336, 2.5]
    np.testing.assert_allclose(geometric_ratios(6, ratio_min=0.25), ratios, rtol=1e-6)
    # By default from 0.1; 0.5 is the geometric mean
    np.testing.assert_allclose(geometric_ratios(3), [0.1, 0.5, 2.5], rtol=1e-6)
    # A single step comes from noise: with r = 0.1 it could move a draw from N(0, 1) by no more than 4 r
    np.testing.assert_allclose(geometric_ratios(1), [2.5], rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("n_steps", [1, 2, 5, 10, 50, 1000])
def test_every_schedule(name, n_steps):
    ratios = SCHEDULES[name](n_steps)
    assert ratios.shape == (n_steps,) and (ratios > 0).all() and ratios.isfinite().all() and (ratios.diff() > 0).all()


@pytest.mark.parametrize("name, ratio", [("vp", 10), ("cosine", 30), ("linear", 30)])
def test_ends_in_noise(name, ratio):
    assert SCHEDULES[name](20)[-1] > ratio
