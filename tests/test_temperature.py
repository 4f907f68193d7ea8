"""Temperature: the direction of its step, its arguments, its state."""

import math

import pytest
import torch as th

from sb3_qsm.losses import box_entropy
from sb3_qsm.temperature import AutoTemperature, FixedTemperature, make_temperature


@pytest.mark.parametrize(
    "gap, action_dim, factor", [(1.0, 1, math.exp(-0.1)), (-1.0, 1, math.exp(0.1)), (3.0, 6, math.exp(-0.05))]
)
def test_step(gap, action_dim, factor):
    """Too much entropy cools, too little heats: log lambda goes by a tenth of the gap per dimension."""
    temperature = AutoTemperature(0.5, target_entropy=-1.0, action_dim=action_dim, rate=0.1)
    loss = temperature.update(th.tensor(gap - 1.0))
    assert temperature.value().item() == pytest.approx(0.5 * factor, rel=1e-5)
    # As SAC logs it, before the step: log lambda times (entropy - target)
    assert loss == pytest.approx(math.log(0.5) * gap, rel=1e-5)


def test_rests_at_the_target():
    temperature = AutoTemperature(0.5, target_entropy=-1.0, action_dim=1)
    assert temperature.update(th.tensor(-1.0)) == 0
    assert temperature.value().item() == pytest.approx(0.5)


@pytest.mark.parametrize("slope", [1e-3, 1.0, 1e3])
def test_converges_to_the_entropy_asked_for(slope):
    """For Q = g a the entropy is that of exp(g a / lambda): lambda meets the target, and soon, whatever the rewards."""
    temperature = AutoTemperature(1.0, target_entropy=-3.0, action_dim=3)
    q_grad = slope * th.tensor([1.0, 2.0, 4.0])
    for _ in range(250):
        temperature.update(box_entropy(q_grad / temperature.value()).sum())
    assert box_entropy(q_grad / temperature.value()).sum().item() == pytest.approx(-3.0, abs=1e-2)


def test_fixed_stays():
    temperature = FixedTemperature(0.2)
    for _ in range(3):
        assert temperature.update(th.tensor(100.0)) == 0
    assert temperature.value().item() == pytest.approx(0.2)


@pytest.mark.parametrize("kind", [FixedTemperature, lambda value: AutoTemperature(value, -1.0, 1)])
def test_value_is_a_float32_constant(kind):
    value = kind(0.3).value()
    assert value.shape == () and value.dtype == th.float32 and not value.requires_grad


@pytest.mark.parametrize(
    "ent_coef, start, automatic",
    [
        ("auto", 1.0, True),
        ("auto_0.1", 0.1, True),
        ("auto_2", 2.0, True),
        (0.3, 0.3, False),
        (2, 2.0, False),
        ("0.3", 0.3, False),
    ],
)
def test_ent_coef(ent_coef, start, automatic):
    temperature = make_temperature(ent_coef, "auto", action_dim=3)
    assert temperature.value().item() == pytest.approx(start)
    assert isinstance(temperature, AutoTemperature) == automatic
    if automatic:
        assert temperature.target_entropy == -1.5
        assert temperature.step == pytest.approx(0.05 / 3)


@pytest.mark.parametrize("target_entropy", [-2.5, 0, "-2.5"])
def test_target_entropy(target_entropy):
    assert make_temperature("auto", target_entropy, action_dim=3).target_entropy == float(target_entropy)


BAD_ENT_COEFS = [0, -1.0, math.nan, math.inf, "auto_0", "auto_-1", "auto_x", "autox", "automatic", "", None, [0.1]]


@pytest.mark.parametrize("ent_coef", BAD_ENT_COEFS)
def test_bad_ent_coef(ent_coef):
    with pytest.raises(
        ValueError, match=r'ent_coef must be a positive number, "auto" or "auto_<positive number>", got '
    ) as error:
        make_temperature(ent_coef, "auto", action_dim=1)
    assert str(error.value).endswith(repr(ent_coef))


@pytest.mark.parametrize("ent_coef", ["auto", 0.1])
@pytest.mark.parametrize("target_entropy", [math.nan, -math.inf, "auto_1", None])
def test_bad_target_entropy(ent_coef, target_entropy):
    with pytest.raises(ValueError, match=r'target_entropy must be a number or "auto", got ') as error:
        make_temperature(ent_coef, target_entropy, action_dim=1)
    assert str(error.value).endswith(repr(target_entropy))
