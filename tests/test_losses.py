"""The equations against numbers worked out by hand and by quadrature."""

import math

import numpy as np
import pytest
import torch as th
from scipy.stats import truncnorm
from torch import nn

from sb3_qsm.losses import (
    action_gradient,
    boltzmann_mean,
    box_entropy,
    box_score_target,
    box_target,
    drawn_target,
    heights_score_target,
    posterior_variance,
    published_score_target,
    published_target,
    score_matching_loss,
    truncated_normal_mean,
)

NODES, WEIGHTS = np.polynomial.legendre.leggauss(400)


def posterior_mean(mean, std, slope=0.0):
    """Mean of exp(slope a) N(a; mean, std^2) on [-1, 1] by quadrature in float64, over the part that has mass."""
    mean, std, slope = (np.asarray(value, dtype=np.float64)[..., None] for value in (mean, std, slope))
    centre = mean + std**2 * slope
    peak = np.clip(centre, -1, 1)
    reach = np.minimum(12 * std, 40 * std**2 / np.maximum(np.abs(centre) - 1, 1e-300))
    low, high = np.maximum(peak - reach, -1), np.minimum(peak + reach, 1)
    a = low + (high - low) * (NODES + 1) / 2
    log_density = slope * (a - peak) - ((a - mean) ** 2 - (peak - mean) ** 2) / (2 * std**2)
    weights = WEIGHTS * np.exp(log_density)
    return peak[..., 0] + (weights * (a - peak)).sum(-1) / weights.sum(-1)


@pytest.mark.parametrize("mean, std", [(0.3, 0.5), (2.0, 0.25), (-2.0, 0.7), (50.0, 20.0)])
def test_quadrature_agrees_with_scipy(mean, std):
    assert posterior_mean(mean, std) == pytest.approx(truncnorm.mean((-1 - mean) / std, (1 - mean) / std, mean, std), rel=1e-9)


@pytest.mark.parametrize("std", [0.01, 0.03, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0])
@pytest.mark.parametrize("limit, tolerance", [(3, 2e-6), (50, 1e-5)])
def test_truncated_normal_mean(std, limit, tolerance):
    mean = th.linspace(-limit, limit, 601)
    result = truncated_normal_mean(mean, th.tensor(std))
    assert result.dtype == th.float32 and result.abs().max() <= 1
    # The result is a difference of numbers of the size of mean; a box much narrower than std costs digits too
    tolerance *= max(1, std)
    np.testing.assert_allclose(result, posterior_mean(mean, np.full(601, std)), atol=tolerance)
    np.testing.assert_array_equal(truncated_normal_mean(-mean, th.tensor(std)), -result)
    assert (result.diff() > -2 * tolerance).all()


@pytest.mark.parametrize("std", [25.0, 40.0, 1e3, 1e5, 1e8])
def test_truncated_normal_mean_much_noise(std):
    """The last levels of the cosine and linear schedules: an exponential of slope mean / std^2."""
    slope = th.tensor([-20.0, -3.0, -0.1, 0.01, 1.0, 7.0, 300.0])
    result = truncated_normal_mean(slope * std**2, th.tensor(std))
    np.testing.assert_allclose(result, 1 / slope.double().tanh() - 1 / slope.double(), atol=1e-3)


@pytest.mark.parametrize("std", [0.05, 0.25, 2.5])
@pytest.mark.parametrize("mean", [1e3, 1e5, 1e8, 1e15])
def test_truncated_normal_mean_far_outside(std, mean):
    """A steep Q at a low temperature asks for a mean millions of standard deviations outside: the answer is the bound."""
    means = th.linspace(0.9, 1.1, 101, dtype=th.float64) * mean
    expected = 1 - std**2 / (means - 1)
    for sign in (1, -1):
        result = truncated_normal_mean(sign * means.float(), th.tensor(std))
        np.testing.assert_allclose(result, sign * expected, atol=1e-5)


def test_truncated_normal_mean_at_the_centre():
    means = th.tensor([0.0, 1e-20, -1e-20])
    np.testing.assert_allclose(truncated_normal_mean(means, th.tensor(0.25)), [0, 0, 0], atol=1e-12)


@pytest.mark.parametrize("ratio", [0.05, 0.25, 1.0, 2.5, 10.0])
@pytest.mark.parametrize("slope", [-20.0, -1.0, 0.0, 0.3, 5.0, 100.0])
def test_box_target_is_exact_for_linear_q(ratio, slope):
    noisy_actions = th.linspace(-3, 3, 61)[:, None] * math.sqrt(1 + ratio**2)
    ent_coef, q_grad = th.tensor(0.2), th.full((61, 1), 0.2 * slope)
    target = box_target(noisy_actions, th.full((61, 1), ratio), q_grad, ent_coef, max_shift=math.inf)
    mean, std = noisy_actions[:, 0], np.full(61, ratio)
    expected = posterior_mean(mean, std, np.full(61, slope))
    # float32 has seven digits of the location before truncation
    location = np.abs(mean.numpy() + ratio**2 * slope)
    tolerance = 1e-5 + 1e-6 * ratio + 4e-7 * location
    assert (np.abs(target[:, 0].numpy() - expected) <= tolerance).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_box_target_cuts_long_shifts(sign):
    # r = 0.5: a shift of r^2 g / lambda = 0.25 g / lambda, at most 4 r = 2, reached at g / lambda = 8
    slope = sign * th.tensor([[3.0], [8.0], [80.0], [math.inf]])
    target = box_target(th.full((4, 1), 0.1), th.full((4, 1), 0.5), slope, th.tensor(1.0))
    expected = posterior_mean(0.1 + sign * np.array([0.75, 2.0, 2.0, 2.0]), np.full(4, 0.5))
    np.testing.assert_allclose(target[:, 0], expected, atol=1e-5)


def test_box_target_for_little_noise():
    """As r -> 0 inside the box, the implied noise is the published one times r."""
    ratio, noisy_actions = th.tensor([[0.01]]), th.tensor([[0.3, -0.7]])
    q_grad, ent_coef = th.tensor([[2.0, -3.0]]), th.tensor(0.5)
    implied = (noisy_actions - box_target(noisy_actions, ratio, q_grad, ent_coef)) / ratio
    np.testing.assert_allclose(implied, -0.01 * q_grad / ent_coef, rtol=1e-3)
    published = (noisy_actions - published_target(noisy_actions, ratio, q_grad, ent_coef)) / ratio
    np.testing.assert_allclose(implied, 0.01 * published, rtol=1e-3)


@pytest.mark.parametrize("ratio", [0.1, 1.0, 5.0])
def test_box_target_for_flat_q(ratio):
    """With g = 0 it is E[a_0 | u] of a uniform policy."""
    noisy_actions = th.linspace(-3, 3, 61)[:, None] * math.sqrt(1 + ratio**2)
    target = box_target(noisy_actions, th.full((61, 1), ratio), th.zeros(61, 1), th.tensor(1.0))
    np.testing.assert_allclose(target[:, 0], posterior_mean(noisy_actions[:, 0], np.full(61, ratio)), atol=2e-5)


def bowl(actions):
    """Q with gradient 2 a."""
    return actions.pow(2).sum(dim=1, keepdim=True)


def test_published_target_by_hand():
    # a_t = (0.4, 2), alpha 0.8, sigma 0.6: u = (0.5, 2.5), r = 0.75. lambda 0.02 (M_q = 50): noise = -50 g = -5 for g = 0.1,
    # a_0 = (0.4 + 0.6 * 5) / 0.8
    noisy_actions, ratio = th.tensor([[0.5, 2.5]]), th.tensor([[0.75]])
    target = published_target(noisy_actions, ratio, th.tensor([[0.1, 0.0]]), th.tensor(0.02))
    np.testing.assert_allclose(target, [[4.25, 2.5]], rtol=1e-6)


def test_published_target_follows_the_gradient_at_the_noisy_action():
    """At that of the variance-preserving chain, a_t = 0.8 u for r = 0.75."""
    noisy_actions, ratio, ent_coef = th.tensor([[0.5, -2.5]]), th.tensor([[0.75]]), th.tensor(0.02)
    target, q_grad = published_score_target(bowl, *2 * [th.full((1, 2), math.nan)], noisy_actions, ratio, ent_coef)
    np.testing.assert_allclose(q_grad, [[0.8, -4.0]], rtol=1e-6)
    assert th.equal(target, published_target(noisy_actions, ratio, q_grad, ent_coef))


def test_box_target_follows_the_gradient_between_the_answer_in_the_box_and_that_of_a_flat_q():
    noisy_actions, ratio, ent_coef = th.tensor([[0.5, -2.5]]), th.tensor([[0.75]]), th.tensor(0.5)
    target, q_grad = box_score_target(bowl, th.tensor([[0.3, -1.7]]), th.zeros(1, 2), noisy_actions, ratio, ent_coef)
    flat_q = posterior_mean(np.array([0.5, -2.5]), np.full(2, 0.75))
    np.testing.assert_allclose(q_grad, [2 * (0.64 * np.array([0.3, -1.0]) + 0.36 * flat_q)], rtol=1e-4)
    assert th.equal(target, box_target(noisy_actions, ratio, q_grad, ent_coef))


@pytest.mark.parametrize("ratio", [0.03, 0.06, 0.1])
def test_answer_that_is_its_own_target_is_right_for_quadratic_q(ratio):
    """
    exp(-k |a - 0.3|^2 / 2 lambda) N(u, r^2) is a normal. Far from the bounds its mean is the fixed point, as long as little
    noise leaves the gradient at the answer.
    """
    precision, ent_coef = 12.0, th.tensor(0.2)
    noisy_actions, answer = th.tensor([[-0.2, 0.3, 0.5]]), th.zeros(1, 3)

    def q_fn(actions):
        return -precision / 2 * (actions - 0.3).pow(2).sum(dim=1, keepdim=True)

    for _ in range(200):
        target, _ = box_score_target(q_fn, answer, 0 * answer, noisy_actions, th.full((1, 1), ratio), ent_coef)
        answer = answer.lerp(target, 0.2)
    weights = np.array([1 / ratio**2, precision / 0.2])
    expected = (weights[0] * noisy_actions.numpy() + weights[1] * 0.3) / weights.sum()
    np.testing.assert_allclose(answer, expected, atol=2e-3)


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_action_gradient(grad_enabled):
    critic = nn.Linear(2, 1)
    actions = th.tensor([[0.5, -1.0], [0.0, 2.0]], requires_grad=True)
    with th.set_grad_enabled(grad_enabled):
        # Q = -(a_1^2 + 3 a_2^2) + critic, hence dQ/da = (-2 a_1, -6 a_2) + weights
        gradient = action_gradient(lambda a: critic(a) - (a**2 * th.tensor([1.0, 3.0])).sum(dim=1, keepdim=True), actions)
    np.testing.assert_allclose(gradient - critic.weight.detach(), [[-1.0, 6.0], [0.0, -12.0]], atol=1e-6)
    assert not gradient.requires_grad
    assert critic.weight.grad is None and critic.bias.grad is None and actions.grad is None


def two_bells(actions):
    """The right one twice as high, in the first dimension."""
    return (th.exp(-8 * (actions[:, :1] + 0.6) ** 2) + 2 * th.exp(-8 * (actions[:, :1] - 0.6) ** 2)).sum(dim=1, keepdim=True)


@pytest.mark.parametrize("ratio", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("noisy_action", [-1.5, 0.0, 0.7])
def test_drawn_target_is_the_posterior_mean(noisy_action, ratio):
    """Of a Q that no slope shows, by quadrature; the denoiser answers something else, and the weights make up for it."""
    grid = th.linspace(-1, 1, 20_001)[:, None]
    weights = th.softmax(two_bells(grid) / 0.5 - 0.5 * ((grid - noisy_action) / ratio) ** 2, dim=0)
    expected = (weights * grid).sum().item()
    u, r = th.full((500, 1), noisy_action), th.full((500, 1), ratio)
    target = drawn_target(two_bells, 0 * u + 0.2, 0 * u + 0.5, u, r, th.tensor(0.5), n_draws=200)
    assert target.mean().item() == pytest.approx(expected, abs=0.01) and target.abs().max() <= 1


def test_heights_are_seen_where_there_is_much_noise():
    """Draws for r > 0.3, slopes below, and the slopes' gradient at all levels."""
    u, ratio = th.full((3000, 1), 0.3), th.tensor([0.2, 0.4, 2.5]).repeat(1000)[:, None]
    answer, ent_coef = (0 * u + 0.2, 0 * u + 0.5, u, ratio), th.tensor(0.5)
    of_slopes, wanted = box_score_target(two_bells, *answer, ent_coef)
    target, q_grad = heights_score_target(two_bells, *answer, ent_coef)
    assert th.equal(q_grad, wanted) and th.equal(target[::3], of_slopes[::3])
    for level in (1, 2):
        drawn = drawn_target(two_bells, *(value[level::3] for value in answer), ent_coef)
        assert target[level::3].mean().item() == pytest.approx(drawn.mean().item(), abs=0.05)
        assert target[level::3].std() > 0.01 > of_slopes[level::3].std()


def test_drawn_target_is_steady_for_a_denoiser_that_is_right():
    """In seventeen dimensions: weights are equal where the draws are from the posterior, and quantiles are spread evenly."""
    u, ratio = th.linspace(-0.5, 0.5, 17).expand(400, 17), th.full((400, 1), 0.1)
    g = th.linspace(-1, 1, 17)
    right = u + 0.01 * g / 0.5  # far from the bounds; the variance is r^2
    target = drawn_target(lambda a: (a * g).sum(dim=1, keepdim=True), right, 0 * u + 0.01, u, ratio, th.tensor(0.5))
    th.testing.assert_close(target.mean(dim=0), right[0], atol=4e-3, rtol=0)
    assert (target - right).std().item() < 0.1 / 4  # a quarter of one draw's, where four at random have a half


def test_drawn_target_spreads_its_draws_in_each_dimension_on_its_own():
    asked = []
    th.manual_seed(0)
    u = th.zeros(1000, 2)
    drawn_target(lambda a: asked.append(a) or a[:, :1], u, u + 1.0, u, th.ones(1000, 1), th.tensor(1.0))
    draws = th.stack(asked)
    standard = truncnorm(-1, 1).cdf(draws.numpy())
    assert (np.sort((standard * 4).astype(int), axis=0) == np.arange(4)[:, None, None]).all()
    assert abs(np.corrcoef(standard.reshape(-1, 2).T)[0, 1]) < 0.05


def test_posterior_variance_by_hand():
    """r^2 times the diagonal of the derivative, on average over signs, whatever couples the dimensions."""
    slopes = th.tensor([[0.3, 0.2], [-0.4, 0.1]])
    noisy_actions = th.zeros(20_000, 2, requires_grad=True)
    ratio = th.tensor([0.5, 2.0]).repeat(10_000)[:, None]
    variance = posterior_variance(noisy_actions @ slopes, noisy_actions, ratio)
    assert not variance.requires_grad
    # Each is the diagonal plus or minus what couples it: 0.3 +- 0.2 and 0.1 +- 0.4, times r^2, and at most 1
    for r, wanted in [(0.5, [[0.025, 0.125], [-0.075, 0.125]]), (2.0, [[0.4, 1.0], [-1.2, 1.0]])]:
        of_level = variance[ratio[:, 0] == r]
        for column, values in zip(of_level.T, wanted, strict=True):
            th.testing.assert_close(column.unique(), th.tensor(values))
            assert (column == column.max()).float().mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("mean, std", [(0.4, 0.3), (2.0, 0.7), (-30.0, 1.5)])
def test_posterior_variance_is_that_of_a_truncated_normal(mean, std):
    """For a flat Q the clean action is normal around u on the box; its variance by quadrature."""
    u, ratio = th.tensor([[mean]], dtype=th.double, requires_grad=True), th.tensor([[std]], dtype=th.double)
    grid = th.linspace(-1, 1, 200_001, dtype=th.double)
    weights = th.softmax(-0.5 * ((grid - mean) / std) ** 2, dim=0)
    expected = (weights * (grid - (weights * grid).sum()) ** 2).sum().item()
    variance = posterior_variance(truncated_normal_mean(u, ratio), u, ratio)
    assert variance.item() == pytest.approx(expected, rel=1e-4)


def test_variance_is_at_most_that_of_the_two_ends():
    u = th.tensor([[0.6]], requires_grad=True)
    assert posterior_variance(1 * u, u, th.tensor([[2.0]])).item() == pytest.approx(1 - 0.36)


def test_score_matching_loss_by_hand():
    prediction, target = th.tensor([[1.0, 2.0], [0.0, -1.0]]), th.tensor([[0.0, 4.0], [1.0, 1.0]])
    # Errors (1, -2), (-1, -2) in units of 0.5 and 2: (2, -4), (-0.5, -1); mean of 4, 16, 0.25, 1
    assert score_matching_loss(prediction, target, th.tensor([[0.5], [2.0]])).item() == pytest.approx(5.3125)


def test_score_matching_loss_is_the_error_of_the_noise():
    ratio, noisy_actions = th.tensor([[0.75], [4 / 3]]), th.tensor([[0.1], [0.9]])
    predicted, wanted = th.tensor([[0.3], [-0.4]]), th.tensor([[1.0], [0.5]])
    loss = score_matching_loss(*(noisy_actions - ratio * noise for noise in (predicted, wanted)), ratio)
    assert loss.item() == pytest.approx((0.7**2 + 0.9**2) / 2, rel=1e-5)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (1, 1)])
def test_score_matching_loss_refuses_to_broadcast(shape):
    with pytest.raises(ValueError, match=r"prediction and target must have one shape, got \(3, 1\) and \("):
        score_matching_loss(th.zeros(3, 1), th.zeros(shape), th.ones(3, 1))


@pytest.mark.parametrize("slope", [1e-6, 1e-4, 1e-2, 0.5, 1.0, 3.0, 10.0, 50.0, 1e3, 1e5])
def test_box_entropy(slope):
    # x is the distance from the favoured bound in units of 1 / slope; the density of a is slope times that of x
    end = min(2 * slope, 60.0)
    x = end * (NODES + 1) / 2
    density = np.exp(-x)
    mass = (WEIGHTS * density).sum() * end / 2
    expected = (WEIGHTS * density * (x + math.log(mass))).sum() * end / 2 / mass - math.log(slope)
    for sign in (1, -1):
        assert box_entropy(th.tensor(sign * slope)).item() == pytest.approx(expected, abs=2e-6)


def test_box_entropy_limits():
    assert box_entropy(th.tensor(0.0)).item() == pytest.approx(math.log(2), abs=1e-6)
    assert box_entropy(th.tensor(1e6)).item() == pytest.approx(1 - math.log(1e6), abs=1e-5)
    assert (box_entropy(th.logspace(-3, 6, 200)).diff() < 1e-6).all()


@pytest.mark.parametrize("ent_coef, expected", [(1e-3, 3.0), (1e6, 1.0), (3 / math.log(4), 2.0)])
def test_boltzmann_mean(ent_coef, expected):
    """Of values 0, 0 and 3: the largest where it is cold, the mean where it is hot; at odds of 4 to 1 to 1 it is 3 * 4 / 6."""
    q_values = th.tensor([0.0, 0.0, 3.0])[:, None, None]
    found = boltzmann_mean(q_values, th.tensor(ent_coef))
    assert found.shape == (1, 1) and found.item() == pytest.approx(expected, rel=1e-4)
    assert boltzmann_mean(q_values - 7, th.tensor(ent_coef)).item() == pytest.approx(expected - 7, rel=1e-4)
