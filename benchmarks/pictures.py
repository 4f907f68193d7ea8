"""Pictures of what a policy does in a world with several good answers."""

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import torch as th
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from benchmarks.algorithms import algorithm_class
from benchmarks.cells import EVALUATION_SEED
from benchmarks.results import Result
from benchmarks.worlds import GOALS, N_OUTCOMES
from sb3_qsm import DiffusionPolicy

N_EPISODES, N_ACTIONS = 60, 500
COLORS = ["tab:blue", "tab:orange", "tab:green", "tab:red", "grey"]  # by outcome; -1, the last, is none
START = {
    "FourActions-v0": np.zeros(1, np.float32),
    "MultiGoal-v0": np.zeros(2, np.float32),
    "CartPoleSwingUp-v0": np.array([0.0, 0.0, -1.0, 0.0, 0.0], np.float32),  # hanging still
}
LABELS = {
    ("FourActions-v0", "paths"): {"xlabel": "first coordinate", "ylabel": "second coordinate", "aspect": "equal"},
    ("FourActions-v0", "actions"): {"xlabel": "first coordinate", "ylabel": "second coordinate"},
    ("MultiGoal-v0", "paths"): {"xlabel": "first coordinate", "ylabel": "second coordinate"},
    ("MultiGoal-v0", "actions"): {"xlabel": "first velocity", "ylabel": "second velocity"},
    ("CartPoleSwingUp-v0", "paths"): {"xlabel": "seconds", "ylabel": "half turns from hanging"},
    ("CartPoleSwingUp-v0", "actions"): {"xlabel": "force", "ylabel": "density"},
}
N_LEVELS = 7  # of a reverse chain, in a strip that can still be read


def mean_q(model: OffPolicyAlgorithm, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """
    :param model: model with critics
    :param observations: a batch, shape (N, observation size)
    :param actions: scaled actions, shape (N, A)
    :return: mean of the critics (and of their quantiles), shape (N,)
    """
    critic: Any = model.policy.critic
    values = critic(observations, actions)
    values = th.stack(values) if isinstance(values, tuple) else values.flatten(1).T
    return values.reshape(-1, len(actions)).mean(0)


def q_values(model: OffPolicyAlgorithm, observation: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """
    :param model: trained model
    :param observation: one observation
    :param actions: shape (N, A)
    :return: :func:`mean_q`, shape (N,)
    """
    model.policy.set_training_mode(False)
    observations = th.as_tensor(np.repeat(observation[None], len(actions), 0), device=model.device)
    with th.no_grad():
        values = mean_q(model, observations, th.as_tensor(actions, dtype=th.float32, device=model.device))
    return values.cpu().numpy()


def reverse_chain(model: OffPolicyAlgorithm, observation: np.ndarray) -> list[np.ndarray]:
    """
    :param model: model with a diffusion policy
    :param observation: one observation
    :return: scaled noisy actions from the start of the chain to its end, T + 1 arrays of shape (N, A)
    """
    actor: Any = model.policy.actor
    observations = th.as_tensor(np.repeat(observation[None], N_ACTIONS, 0), device=model.device)
    noise = th.randn(1 + actor.noise_schedule.n_steps, N_ACTIONS, actor.action_dim, device=model.device)
    seen = []
    with th.no_grad():
        denoise = actor.denoise_fn(observations)

        def seeing_denoise(x_t: th.Tensor, t: int) -> th.Tensor:
            seen.append(x_t)
            return denoise(x_t, t)

        actions = actor.sampler(seeing_denoise, actor.noise_schedule, noise[0], noise[1:])
    return [x_t.cpu().numpy() for x_t in (*seen, actions)]


def draw_actions(ax: Axes, model: OffPolicyAlgorithm, observation: np.ndarray, actions: np.ndarray, limit: float) -> None:
    """
    :param ax: where to draw the density of the actions and, behind it, the critics' values
    :param model: trained model
    :param observation: one observation
    :param actions: shape (N, A), with A at most 2
    :param limit: actions are shown in [-limit, limit]
    """
    axis = np.linspace(-1, 1, 61)
    if actions.shape[1] == 1:
        ax.hist(actions[:, 0], bins=list(np.linspace(-limit, limit, 41)), density=True, color="tab:orange", alpha=0.7)
        q_axis = ax.twinx()
        q_axis.plot(axis, q_values(model, observation, axis[:, None]), color="black", lw=1)
        q_axis.set(yticks=[])
    else:
        grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
        ax.contourf(axis, axis, q_values(model, observation, grid).reshape(61, 61), levels=20, cmap="Greys")
        ax.scatter(actions[:, 0], actions[:, 1], s=4, color="tab:orange", alpha=0.6, lw=0)
        ax.set(ylim=(-limit, limit), yticks=[-1, 0, 1], aspect="equal")
    ax.set(xlim=(-limit, limit), xticks=[-1, 0, 1])
    ax.grid(visible=False)


def draw_paths(ax: Axes, model: OffPolicyAlgorithm, task: str) -> None:
    """
    :param ax: where to draw episodes with sampled actions, coloured by their end
    :param model: trained model
    :param task: environment id of a world
    """
    envs = [gym.make(task) for _ in range(N_EPISODES)]
    observations = np.array([env.reset(seed=EVALUATION_SEED + i)[0] for i, env in enumerate(envs)])
    paths = [[env.unwrapped.point()] for env in envs]  # type: ignore[attr-defined]
    running = list(range(N_EPISODES))
    while running:
        actions, _ = model.predict(observations[running])
        for i, action in zip(tuple(running), actions, strict=True):
            observations[i], _, terminated, truncated, info = envs[i].step(action)
            paths[i].append(envs[i].unwrapped.point())  # type: ignore[attr-defined]
            if terminated or truncated:
                running.remove(i)
                reached = info["outcome"] >= 0  # in front of those that did not
                ax.plot(*np.array(paths[i]).T, color=COLORS[info["outcome"]], lw=0.8, alpha=0.6, zorder=1 + reached)
    if task == "MultiGoal-v0":
        axis = np.linspace(-7, 7, 71)
        places = np.stack(np.meshgrid(axis, axis), axis=-1)
        distance = np.linalg.norm(places[:, :, None] - GOALS, axis=-1).min(axis=-1)
        ax.contour(axis, axis, distance**2, levels=12, colors="grey", linewidths=0.4, alpha=0.6)
        ax.scatter(*GOALS.T, color="black", zorder=3)
        ax.set(aspect="equal", xticks=[-5, 0, 5], yticks=[-5, 0, 5])


def world_pictures(results: list[Result]) -> Iterator[tuple[str, str, Figure]]:
    """
    For each world and algorithm, of the first seed whose trained model still lies beside its result.

    :param results: all results
    :return: name, caption and figure, one after the other
    """
    for task in (task for task in N_OUTCOMES if any(it.task == task for it in results)):
        runs = {it.algorithm: it for it in reversed(results) if it.task == task and (it.folder / "model.zip").exists()}
        models = {name: algorithm_class(name).load(run.folder / "model", device="cpu") for name, run in reversed(runs.items())}
        if not models:
            continue
        th.manual_seed(EVALUATION_SEED)
        for kind, caption in (
            ("paths", f"{N_EPISODES} episodes with sampled actions, coloured by their end, grey for none."),
            (
                "actions",
                f"{N_ACTIONS} actions for the start state (orange) over what the critics think (dark: high; or a line).",
            ),
        ):
            columns = min(len(models), 4)
            n_rows = -(-len(models) // columns)
            size = (3.4 * columns, 3.4 * n_rows)
            figure, axes = plt.subplots(
                n_rows, columns, figsize=size, squeeze=False, sharey=kind == "paths", layout="constrained"
            )
            for ax in axes.flat[len(models) :]:
                ax.remove()
            for ax, (name, model) in zip(axes.flat, models.items(), strict=False):
                if kind == "paths":
                    draw_paths(ax, model, task)
                else:
                    actions, _ = model.predict(np.repeat(START[task][None], N_ACTIONS, 0))
                    draw_actions(ax, model, START[task], actions, 1.0)
                ax.set(title=name, **LABELS[task, kind])
                if not ax.get_subplotspec().is_first_col():
                    ax.set(ylabel="")
            yield f"{task}-{kind}", f"{task}: {caption}", figure
        diffusions = {name: model for name, model in models.items() if isinstance(model.policy, DiffusionPolicy)}
        if diffusions:
            yield (
                f"{task}-chain",
                f"{task}: the reverse chain at the start state, from noise (left) to the action, with the steps still to go.",
                chain_strip(diffusions, task),
            )


def chain_strip(models: dict[str, OffPolicyAlgorithm], task: str) -> Figure:
    """
    :param models: models with diffusion policies, by name
    :param task: environment id of a world
    :return: one row per model, one panel for each of some levels of noise, from all to none
    """
    chains = {name: reverse_chain(model, START[task]) for name, model in models.items()}
    columns = min(N_LEVELS, max(map(len, chains.values())))
    size = (1.9 * columns, 2.1 * len(chains))
    figure, axes = plt.subplots(len(chains), columns, figsize=size, squeeze=False, layout="constrained")
    for row, (name, chain) in zip(axes, chains.items(), strict=True):
        done = np.linspace(0, len(chain) - 1, min(columns, len(chain))).round().astype(int)
        for ax in row[len(done) :]:
            ax.remove()
        for ax, step in zip(row, done, strict=False):
            draw_actions(ax, models[name], START[task], chain[step], 2.5)
            left = len(chain) - 1 - step
            ax.set(xticks=[], yticks=[], title=name if step == 0 else f"{left} to go" if left else "action")
    return figure
