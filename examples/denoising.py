"""
From noise to actions: the reverse chain of a trained policy as an animation over the critics' landscape. About a minute:

    pip install -e ".[zoo]"  # for matplotlib and the progress bar
    python examples/denoising.py
"""

from itertools import pairwise

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch as th
from four_goals import GOALS, PLAIN, FourGoals, learnt_q
from matplotlib.animation import FuncAnimation, PillowWriter

from sb3_qsm import QSM


def main(steps=2500, path="denoising.gif", frames_per_level=6, n_actions=400):
    model = QSM("MlpPolicy", FourGoals(), 1e-3, ent_coef="auto_0.1", policy_kwargs=PLAIN, seed=0, device="cpu")
    model.learn(steps, progress_bar=True)
    noise = th.randn(1 + len(model.actor.levels), n_actions, model.actor.action_dim)
    with th.no_grad():
        points = model.actor.trajectory(th.zeros(n_actions, 1), noise).numpy()
    pauses = [points[0]] * 3, [points[-1]] * 12
    between = [a + (b - a) * s for a, b in pairwise(points) for s in np.linspace(0, 1, frames_per_level)]
    frames = [*pauses[0], *between, *pauses[1]]

    axis = np.linspace(-1, 1, 81)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    figure, panel = plt.subplots(figsize=(4, 4))
    figure.subplots_adjust(0, 0, 1, 1)
    panel.contourf(axis, axis, learnt_q(model, grid).reshape(81, 81), levels=12, cmap="Greys")
    panel.scatter(*GOALS.T, marker="x", s=60, color="tab:blue", zorder=3)
    dots = panel.scatter(*frames[0].T, s=7, color="tab:orange")
    panel.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), aspect="equal")
    panel.axis("off")
    FuncAnimation(figure, lambda i: dots.set_offsets(frames[i]), frames=len(frames)).save(path, PillowWriter(fps=12), dpi=90)
    print(f"animation: {path}")


if __name__ == "__main__":
    main()
