"""
Small environments with several equally good answers: best actions, goals in a plane, the two ways to swing up a pole.

And two wrappers that scale the rewards of any environment.
"""

from typing import Any

import gymnasium as gym
import numpy as np

FOUR_ACTIONS = 0.6 * np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]], dtype=np.float32)
GOALS = np.array([[5.0, 0.0], [-5.0, 0.0], [0.0, 5.0], [0.0, -5.0]], dtype=np.float32)


class Bandit(gym.Env):
    """
    One state, one step, equally good actions: reward -4 d^2 with the distance d to the nearest of them.

    ``info["outcome"]`` is the index of the one within distance 0.35, or -1.

    :param optima: the best actions, shape (N, A)
    """

    def __init__(self, optima: Any = FOUR_ACTIONS) -> None:
        self.optima = np.array(optima)
        self.observation_space = gym.spaces.Box(0.0, 1.0, (1,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (self.optima.shape[1],), np.float32)
        self.action = np.zeros(self.optima.shape[1], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """
        :param seed: not used
        :param options: not used
        :return: the state and empty info
        """
        super().reset(seed=seed)
        self.action = np.zeros_like(self.action)
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """
        :param action: shape (A,)
        :return: the state, reward, True, False, which of the best actions it was
        """
        self.action = np.asarray(action, np.float32)
        distances = np.linalg.norm(self.action - self.optima, axis=1)
        outcome = int(distances.argmin()) if distances.min() < 0.35 else -1
        return np.zeros(1, np.float32), -4.0 * float(distances.min()) ** 2, True, False, {"outcome": outcome}


class MultiGoal(gym.Env):
    """
    A point in the plane, four goals at equal distance (Haarnoja et al., 2017, arXiv:1702.08165).

    p' = clip(p + a), reward -30 |a|^2 - min_g |p' - g|^2, and +10 and the end within distance 1 of a goal.
    ``info["outcome"]`` is the index of the goal reached, or -1.
    """

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(-7.0, 7.0, (2,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.position = np.zeros(2, np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """
        :param seed: seed of the start position
        :param options: ``{"position": (x, y)}`` starts there
        :return: position and empty info
        """
        super().reset(seed=seed)
        start = (options or {}).get("position", 0.1 * self.np_random.standard_normal(2))
        self.position = np.asarray(start, np.float32)
        return self.position.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """
        :param action: velocity, shape (2,), clipped to [-1, 1]
        :return: position, reward, whether a goal is reached, False, which goal
        """
        action = np.clip(action, -1.0, 1.0)
        self.position = np.clip(self.position + action, -7.0, 7.0).astype(np.float32)
        distances = np.linalg.norm(self.position - GOALS, axis=1)
        reached = bool(distances.min() < 1.0)
        reward = -30.0 * np.square(action).sum() - distances.min() ** 2 + 10.0 * reached
        outcome = int(distances.argmin()) if reached else -1
        return self.position.copy(), float(reward), reached, False, {"outcome": outcome}


class CartPoleSwingUp(gym.Env):
    """
    A pole that hangs from a cart and is to stand upright; clockwise and counter-clockwise are equally good.

    The system of Barto, Sutton and Anderson (1983) as in gymnasium's CartPole, with a continuous force, the angle free
    and a wall at each end of the track. Reward (1 + cos(angle)) / 2 per step, at most 1, less up to 0.1 for distance from
    the centre. ``info["outcome"]`` is the side by which the pole first came within 30 degrees of upright: 0 clockwise,
    1 counter-clockwise, -1 never.
    """

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (5,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.state = np.zeros(4)
        self.n_steps = 0
        self.outcome = -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """
        :param seed: seed of the start state
        :param options: not used
        :return: observation and empty info
        """
        super().reset(seed=seed)
        self.state = np.array([0.0, 0.0, np.pi, 0.0]) + 0.05 * self.np_random.standard_normal(4)
        self.n_steps, self.outcome = 0, -1
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """
        :param action: force as a share of 10 N, shape (1,), clipped to [-1, 1]
        :return: observation, reward, False, False, which way the pole went up
        """
        gravity, cart, pole, half_length, dt = 9.8, 1.0, 0.1, 0.5, 0.02
        self.n_steps += 1
        x, x_dot, angle, angle_dot = self.state.tolist()
        force = 10.0 * float(np.clip(action[0], -1.0, 1.0))
        sin, cos = np.sin(angle), np.cos(angle)
        push = (force + pole * half_length * angle_dot**2 * sin) / (cart + pole)
        angle_acc = (gravity * sin - cos * push) / (half_length * (4.0 / 3.0 - pole * cos**2 / (cart + pole)))
        x_acc = push - pole * half_length * angle_acc * cos / (cart + pole)
        x_dot, angle_dot = x_dot + dt * x_acc, angle_dot + dt * angle_acc
        x, angle = x + dt * x_dot, angle + dt * angle_dot
        if abs(x) > 2.4:  # the walls do not give way
            x, x_dot = float(np.sign(x)) * 2.4, 0.0
        self.state = np.array([x, x_dot, angle, angle_dot])
        # The angle is not wrapped: it began near pi, upright is 0 on one way and 2 pi on the other.
        if self.outcome == -1 and np.cos(angle) > np.cos(np.pi / 6):
            self.outcome = int(angle < np.pi)
        reward = (1.0 + np.cos(angle)) / 2.0 - 0.1 * (x / 2.4) ** 2
        return self._observation(), float(reward), False, False, {"outcome": self.outcome}

    def _observation(self) -> np.ndarray:
        x, x_dot, angle, angle_dot = self.state
        return np.array([x, x_dot, np.cos(angle), np.sin(angle), angle_dot], np.float32)


def tenth_of_reward(env: gym.Env) -> gym.Env:
    """
    :param env: any environment
    :return: the same with a tenth of the reward
    """
    return gym.wrappers.TransformReward(env, lambda reward: 0.1 * float(reward))


def tenfold_reward(env: gym.Env) -> gym.Env:
    """
    :param env: any environment
    :return: the same with ten times the reward
    """
    return gym.wrappers.TransformReward(env, lambda reward: 10.0 * float(reward))


# Number of equally good ends of an episode
N_OUTCOMES = {"FourActions-v0": 4, "MultiGoal-v0": 4, "CartPoleSwingUp-v0": 2}

gym.register("FourActions-v0", f"{__name__}:Bandit", max_episode_steps=1)
gym.register("MultiGoal-v0", f"{__name__}:MultiGoal", max_episode_steps=30)
gym.register("CartPoleSwingUp-v0", f"{__name__}:CartPoleSwingUp", max_episode_steps=250)
