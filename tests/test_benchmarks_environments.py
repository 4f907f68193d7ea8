"""The benchmark's own environments and score targets, by hand."""

from pkgutil import resolve_name

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.utils.env_checker import check_env

pytest.importorskip("rl_zoo3")

from benchmarks import targets
from benchmarks.environments import GOALS, N_OUTCOMES, MultiGoal
from benchmarks.suites import read_suite, select


@pytest.mark.parametrize("task", N_OUTCOMES)
def test_environments_follow_gymnasium(task):
    check_env(gym.make(task).unwrapped, skip_render_check=True)


def test_four_actions():
    env = gym.make("FourActions-v0")
    found = []
    for action in ([0.6, -0.6], [0.6, -0.3], [0.6, -0.2], [-0.6, 0.6]):
        env.reset(seed=0)
        _, reward, terminated, _, info = env.step(np.array(action, np.float32))
        found.append((round(reward, 4), terminated, info["outcome"]))
    assert found == [(0.0, True, 2), (-0.36, True, 2), (-0.64, True, -1), (0.0, True, 1)]


@pytest.mark.parametrize(
    ("move", "expected"),
    [(lambda position: np.zeros(2), -718), (lambda position: 0.5 * np.array([1.0, 0.0]), -116)],
    ids=["standing still", "straight line at speed 0.5"],
)
def test_multi_goal_reference_returns(move, expected):
    env = gym.make("MultiGoal-v0")
    returns = []
    for seed in range(200):
        position, _ = env.reset(seed=seed)
        # Towards the right-hand goal, but from where it is the nearest: the four are symmetric
        env.unwrapped.position = position = np.abs(position)[np.argsort(-np.abs(position))]
        total, over = 0.0, False
        while not over:
            position, reward, terminated, truncated, _ = env.step(move(position).astype(np.float32))
            total, over = total + reward, terminated or truncated
        returns.append(total)
    assert np.mean(returns) == pytest.approx(expected, abs=2)


def test_multi_goal_by_hand():
    env = gym.make("MultiGoal-v0").unwrapped
    for goal, direction in enumerate(GOALS / 5):
        env.reset(options={"position": 3.5 * direction})
        _, reward, terminated, _, info = env.step(0.5 * direction)  # to 4, distance 1: not yet
        assert (reward, terminated, info["outcome"]) == (pytest.approx(-30 * 0.25 - 1), False, -1)
        _, reward, terminated, _, info = env.step(2 * direction)  # clipped to 1: to 5
        assert (reward, terminated, info["outcome"]) == (pytest.approx(-30 + 10), True, goal)


def test_swing_up_is_the_same_either_way():
    ends = []
    for side in (-1.0, 1.0):
        env = gym.make("CartPoleSwingUp-v0").unwrapped
        env.reset(seed=0)
        env.state = np.array([0.0, 0.0, np.pi, 0.0])
        total = 0.0
        for _ in range(250):
            angle_dot = env.state[3] or side
            _, reward, _, _, info = env.step(np.array([-np.sign(angle_dot * np.cos(env.state[2]))], np.float32))  # pump energy
            total += reward
            if info["outcome"] >= 0:
                break
        ends.append((total, info["outcome"]))
    (left_return, left), (right_return, right) = ends
    assert {left, right} == {0, 1}
    assert left_return == pytest.approx(right_return)


def test_pole_keeps_its_energy():
    # Frictionless and not pushed: what it falls it climbs again, on the side it came from and no further
    env = gym.make("CartPoleSwingUp-v0").unwrapped
    env.reset(seed=0)
    env.state = np.array([0.0, 0.0, np.pi / 2, 0.0])
    angles = []
    for _ in range(250):
        env.step(np.zeros(1, np.float32))
        angles.append(env.state[2])
    assert max(angles) == pytest.approx(3 * np.pi / 2, abs=0.1)
    assert min(angles) == pytest.approx(np.pi / 2, abs=0.1)


@pytest.mark.parametrize("label, factor", [("tenth", 0.1), ("tenfold", 10.0)])
def test_reward_scale(label, factor):
    runs = select(read_suite("reward-scale"), algorithm=[f"qsm-{label}"])
    wrap = resolve_name(runs[0].hyperparams["env_wrapper"])
    scaled, plain = wrap(MultiGoal()), MultiGoal()
    for env in (scaled, plain):
        env.reset(seed=0)
    assert scaled.step(np.ones(2))[1] == pytest.approx(factor * plain.step(np.ones(2))[1])


def test_ablated_target():
    denoised, noisy_actions, ratio = (th.tensor([[x]]) for x in (-0.4, 0.6, 0.75))  # alpha 0.8, sigma 0.6
    _, q_grad = targets.at_noisy(lambda a: a**2 / 2, denoised, 0 * denoised, noisy_actions, ratio, th.tensor(1.0))
    assert q_grad.item() == pytest.approx(0.8 * 0.6)
    # Q = 20 a shifts by 0.75 * 20 = 15 units of r, cut to 4
    answer, _ = targets.at_noisy(lambda a: 20 * a, denoised, 0 * denoised, noisy_actions, ratio, th.tensor(1.0))
    assert answer.item() == pytest.approx(0.8100, abs=1e-4)
