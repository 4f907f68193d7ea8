"""
Four equally good ways through many steps: a point in the plane, goals on four sides. SAC and the defaults of QSM take one or
two of them, ``keep_modes`` keeps them. Five to ten minutes:

    pip install -e ".[benchmarks]"  # for matplotlib, the progress bar and the environment
    python examples/four_ways.py
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import torch as th
from stable_baselines3 import SAC

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.environments import GOALS, MultiGoal
from sb3_qsm import QSM


def paths(model, n_episodes=40):
    """Positions of each episode with sampled actions, from near the centre."""
    env = gym.wrappers.TimeLimit(MultiGoal(), 30)
    for seed in range(n_episodes):
        obs, _ = env.reset(seed=seed)
        path, done = [obs], False
        while not done:
            obs, _, terminated, truncated, _ = env.step(model.predict(obs)[0])
            path.append(obs)
            done = terminated or truncated
        yield np.array(path)


def values(model, positions, n_draws=8):
    """What the critics say of a drawn action, the mean of several, at each position."""
    obs = th.as_tensor(np.repeat(positions, n_draws, axis=0), dtype=th.float32)
    actions = th.as_tensor(model.policy.scale_action(model.predict(obs.numpy())[0]))
    with th.no_grad():
        q_values = th.cat(model.critic(obs, actions), dim=1).mean(dim=1)
    return q_values.reshape(-1, n_draws).mean(dim=1).numpy()


def main(steps=10_000, path="four_ways.png"):
    algorithms = {"SAC": (SAC, {}), "QSM": (QSM, {}), "QSM, keep_modes=True": (QSM, {"keep_modes": True})}
    axis = np.linspace(-7, 7, 61)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2).astype(np.float32)
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained", sharey=True)
    for panel, (name, (algorithm, kwargs)) in zip(panels, algorithms.items(), strict=True):
        kwargs |= dict(learning_starts=1000, policy_kwargs=dict(net_arch=[64, 64]), seed=0, device="cpu")
        model = algorithm("MlpPolicy", gym.wrappers.TimeLimit(MultiGoal(), 30), 1e-3, **kwargs)
        model.learn(steps, progress_bar=True)
        panel.contourf(axis, axis, values(model, grid).reshape(61, 61), levels=14, cmap="Greys_r", alpha=0.6)
        for episode in paths(model):
            panel.plot(*episode.T, color="tab:orange", linewidth=1, alpha=0.7)
        panel.scatter(*GOALS.T, marker="x", s=60, color="tab:blue", zorder=3)
        panel.set(title=name, xlim=(-7, 7), ylim=(-7, 7), aspect="equal", xticks=[], yticks=[])
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
