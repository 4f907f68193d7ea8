"""Figures of the report and of the documentation."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from .statistics import MODES, Estimate, Result, estimate, iqm, normalised, read_results, scales

# Okabe and Ito's colours, which the colour-blind can tell apart, and a dash pattern for the most frequent
STYLES: dict[str, tuple[str, str, str]] = {
    "qsm": ("QSM", "#d55e00", "-"),
    "qsm-plain": ("QSM, plain critics", "#e69f00", "-."),
    "sac": ("SAC", "#0072b2", "--"),
    "td3": ("TD3", "#444444", ":"),
    "tqc": ("TQC", "#009e73", "-."),
    "crossq": ("CrossQ", "#cc79a7", "-."),
    "published_qsm": ("QSM as published", "#b5651d", "--"),
    "diffusion_ql": ("Diffusion-QL", "#56b4e9", "-"),
    "dipo": ("DIPO", "#8c6d1f", "-"),
    "qvpo": ("QVPO", "#7b3294", "-"),
    "dacer_style": ("DACER-style", "#999999", "-"),
}
plt.rcParams.update({
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "font.size": 12, "axes.titlesize": 12, "legend.frameon": False,
})  # fmt: skip


def styles(algorithms: list[str]) -> dict[str, tuple[str, str, str]]:
    """
    :param algorithms: names
    :return: label, colour and line style of each: the same in every figure for those of ``STYLES``, others in grey tones
    """
    others = [name for name in algorithms if name not in STYLES]
    tones = dict(zip(others, plt.get_cmap("viridis")(np.linspace(0, 0.9, len(others))), strict=True))
    return {name: STYLES.get(name) or (name, matplotlib.colors.to_hex(tones[name]), "-") for name in algorithms}


def name_of(algorithm: str) -> str:
    """
    :param algorithm: name
    :return: the same as papers write it
    """
    return STYLES[algorithm][0] if algorithm in STYLES else algorithm


def title(task: str) -> str:
    """
    :param task: environment id
    :return: the same without what is common to all
    """
    return task.removeprefix("dm_control/").rsplit("-v", 1)[0]


def draw_band(ax: Axes, x: np.ndarray, curve: Estimate, style: tuple[str, str, str]) -> None:
    """
    :param ax: where to draw
    :param x: shape (E,)
    :param curve: values and intervals, each of shape (E,)
    :param style: label, colour and line style
    """
    label, color, line = style
    front = 3 if label == "QSM" else 2
    ax.plot(x, curve.value, line, color=color, lw=2.4 if label == "QSM" else 1.8, label=label, zorder=front)
    ax.fill_between(x, curve.low, curve.high, color=color, alpha=0.15, lw=0)


def finish(figure: Figure, first: Axes) -> Figure:
    """
    :param figure: figure with all its curves
    :param first: panel that has every curve
    :return: the figure with one legend above its panels
    """
    handles, labels = first.get_legend_handles_labels()
    columns = min(len(labels), 60 // (8 + max(map(len, labels))))  # 60 characters are as wide as a figure
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, handlelength=2.6)
    return figure


def draw_all_tasks(ax: Axes, results: list[Result], mode: str, reference: str) -> None:
    """
    :param ax: where to draw the interquartile mean of the normalised return over runs and tasks
    :param results: all results
    :param mode: "deterministic" or "sampled"
    :param reference: algorithm to normalise by
    """
    curves = normalised(results, scales(results, reference), mode)
    steps = results[0].rows(mode)["step"].to_numpy()
    for name, style in styles(list(curves)).items():
        draw_band(ax, steps, estimate(iqm, curves[name]), style)
    ax.axhline(1, color="grey", lw=1)


def learning_curves(results: list[Result], mode: str, axis: str = "step") -> Figure:
    """
    :param results: all results
    :param mode: "deterministic" or "sampled"
    :param axis: "step" or "training_s"
    :return: one panel per task, interquartile mean over seeds, band its 95 % interval; all tasks together where there is room
    """
    tasks = list(dict.fromkeys(it.task for it in results))
    algorithms = list(dict.fromkeys(it.algorithm for it in results))
    style = styles(algorithms)
    columns = min(len(tasks), 2)
    n_rows = -(-len(tasks) // columns)
    figure, axes = plt.subplots(n_rows, columns, figsize=(6.4, 2.4 * n_rows + 0.6), squeeze=False, layout="constrained")
    for ax, task in zip(axes.flat, tasks, strict=False):
        for algorithm in algorithms:
            runs = [it for it in results if (it.task, it.algorithm) == (task, algorithm)]
            if runs:
                x = np.mean([run.rows(mode)[axis] for run in runs], axis=0)
                draw_band(ax, x, estimate(iqm, np.array([[run.curve(mode)] for run in runs])), style[algorithm])
        ax.set_title(title(task))
    if axes.size > len(tasks):
        if axis == "step" and "sac" in algorithms:
            draw_all_tasks(axes.flat[-1], results, mode, "sac")
            axes.flat[-1].set_title("all tasks, 1 is SAC's end")
        else:
            axes.flat[-1].remove()
    for ax in figure.axes:
        ax.xaxis.set_major_formatter(EngFormatter(unit="s" if axis == "training_s" else "", sep=""))
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.margins(x=0.02)
    figure.supxlabel({"step": "environment steps", "training_s": "training time"}[axis], size="medium")
    figure.supylabel("return" if mode == MODES[0] else "return, sampled actions", size="medium")
    return finish(figure, axes.flat[0])


def sample_efficiency(results: list[Result], reference: str) -> Figure:
    """
    :param results: all results
    :param reference: algorithm to normalise by
    :return: all tasks together against environment steps, deterministic actions
    """
    figure, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    draw_all_tasks(ax, results, MODES[0], reference)
    unit = "return / 1000" if results[0].task.startswith("dm_control/") else f"return, 1 is {name_of(reference)}'s end"
    ax.set(xlabel="environment steps", ylabel=unit)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.margins(x=0.02)
    return finish(figure, ax)


def intervals(results: list[Result], reference: str) -> Figure:
    """
    :param results: all results
    :param reference: algorithm to normalise by
    :return: interquartile mean of the final normalised return of each algorithm, bar its 95 % interval
    """
    curves = normalised(results, scales(results, reference), MODES[0])
    figure, ax = plt.subplots(figsize=(6.4, 0.3 * len(curves) + 0.8), layout="constrained")
    for i, (name, scores) in enumerate(curves.items()):
        value, low, high = estimate(iqm, scores[..., -1])
        color = STYLES[name][1] if name in STYLES else "#777777"
        ax.barh(i, high - low, left=low, color=color, alpha=0.35, height=0.6)
        ax.plot([value, value], [i - 0.3, i + 0.3], color=color, lw=3)
    ax.axvline(1, color="grey", lw=1, zorder=0)
    labels = [name_of(name).removeprefix(f"{reference}-") for name in curves]
    ax.set(yticks=range(len(curves)), yticklabels=labels, xlabel=f"final return, 1 is {name_of(reference)}'s")
    ax.tick_params(axis="y", length=0)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    return figure


def of_pages(folder: Path) -> Iterator[tuple[str, Figure]]:
    """
    :param folder: folder of the collected results
    :return: name and figure of every picture of the documentation that results are drawn in
    """
    for suite in ("mujoco-100k", "mujoco-300k", "dmc-100k"):
        yield suite.replace("-", "_"), learning_curves(read_results(folder / f"{suite}.csv"), MODES[0])


def save(figure: Figure, file: object) -> None:
    """
    :param figure: figure, closed afterwards
    :param file: path or open file for a PNG
    """
    figure.savefig(file, dpi=200, metadata={"Software": None})  # type: ignore[arg-type]
    plt.close(figure)
