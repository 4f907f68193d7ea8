"""
The picture that explains the method: one state, four equally good actions.

SAC's policy is one Gaussian and cannot say "one of these four"; a diffusion policy can. Takes about two minutes:

    pip install -e ".[zoo]"  # for matplotlib and the progress bar
    python examples/four_goals.py
"""

import gymnasium as gym
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch as th
from stable_baselines3 import SAC

from sb3_qsm import QSM

GOALS = 0.6 * np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])
WIDTH = 0.25


def reward_of(actions):
    """One at each goal, falling off like a bell of standard deviation ``WIDTH``; actions of shape (N, 2)."""
    distances = np.linalg.norm(actions[:, None] - GOALS, axis=2)
    return np.exp(-0.5 * (distances.min(axis=1) / WIDTH) ** 2)


class FourGoals(gym.Env):
    """One observation, one step."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), float(reward_of(action[None])[0]), True, False, {}


# There is no next state to foretell: plain critics, without the representation
PLAIN = dict(embedding_dim=None, layer_norm=True, net_arch=[256, 256])


def learnt_q(model, actions):
    """Mean of the critics at actions of shape (N, 2)."""
    with th.no_grad():
        q_values = model.critic(th.zeros(len(actions), 1), th.as_tensor(actions, dtype=th.float32))
    return th.cat(q_values, dim=1).mean(dim=1).numpy()


def main(steps=2500, path="four_goals.png"):
    axis = np.linspace(-1, 1, 81)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    figure, panels = plt.subplots(1, 2, figsize=(9, 5.2), layout="constrained", sharey=True)
    for panel, algorithm in zip(panels, (QSM, SAC), strict=True):
        policy_kwargs = PLAIN if algorithm is QSM else None
        model = algorithm(
            "MlpPolicy", FourGoals(), 1e-3, ent_coef="auto_0.1", policy_kwargs=policy_kwargs, seed=0, device="cpu"
        )
        model.learn(steps, progress_bar=True)
        actions, _ = model.predict(np.zeros((500, 1), np.float32))
        nearest = np.linalg.norm(actions[:, None] - GOALS, axis=2).argmin(axis=1)
        shares = ", ".join(f"{share:.0%}" for share in np.bincount(nearest, minlength=4) / len(actions))
        panel.contourf(axis, axis, learnt_q(model, grid).reshape(81, 81), levels=20, cmap="Greys")
        panel.scatter(*actions.T, s=6, color="tab:orange", label="500 actions, one observation")
        panel.scatter(*GOALS.T, marker="x", color="tab:blue", label="equally good goals")
        panel.set(title=f"{algorithm.__name__}: mean reward {reward_of(actions).mean():.2f}\nby goal {shares}", aspect="equal")
        panel.set(xlabel="first action", xlim=(-1, 1), ylim=(-1, 1))
    panels[0].set(ylabel="second action")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
