"""The figures of the report. Every one shows single runs beside their summary."""

import matplotlib

matplotlib.use("Agg")

from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from benchmarks.algorithms import ALGORITHMS
from benchmarks.results import Estimate, Result, estimate, improvement, iqm, profile

Color = tuple[float, float, float, float]
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25})


def colors(algorithms: list[str]) -> dict[str, Color]:
    """
    :param algorithms: names
    :return: a colour for each, no two alike, and the same in every report for those in ``ALGORITHMS``
    """
    names = [*ALGORITHMS, *(name for name in algorithms if name not in ALGORITHMS)]
    palette = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    variants = plt.get_cmap("nipy_spectral")(np.linspace(0.05, 0.95, len(names) - len(palette)))
    return dict(zip(names, [*palette, *map(tuple, variants)], strict=True))


def panels(n: int, legend: dict[str, Color]) -> tuple[Figure, list[Axes]]:
    """
    :param n: number of panels
    :param legend: colour of each algorithm
    :return: figure with a legend above, and its panels
    """
    columns = min(n, 3)
    n_rows = -(-n // columns)
    width = max(4.4 * columns, 7.0)
    n_columns_of_legend = int(width / 1.4)  # inches for a long name
    legend_height = 0.25 * -(-len(legend) // n_columns_of_legend)
    size = (width, 3.4 * n_rows + legend_height)
    figure, axes = plt.subplots(n_rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[n:]:
        ax.remove()
    handles = [plt.Line2D([], [], color=color, lw=2, label=name) for name, color in legend.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=n_columns_of_legend, frameon=False)
    return figure, list(axes.flat[:n])


def draw_band(ax: Axes, x: np.ndarray, curve: Estimate, color: Color) -> None:
    """
    :param ax: where to draw
    :param x: shape (E,)
    :param curve: values and intervals, each of shape (E,)
    :param color: colour of both
    """
    ax.plot(x, curve.value, color=color, lw=2)
    ax.fill_between(x, curve.low, curve.high, color=color, alpha=0.12, lw=0)


def learning_curves(results: list[Result], mode: str, axis: str) -> Figure:
    """
    :param results: all results
    :param mode: "deterministic" or "sampled"
    :param axis: "step" or "training_s"
    :return: one panel per task: thin line each seed, thick line the interquartile mean, band its 95 % interval
    """
    tasks = list(dict.fromkeys(it.task for it in results))
    algorithms = list(dict.fromkeys(it.algorithm for it in results))
    palette = {name: color for name, color in colors(algorithms).items() if name in algorithms}
    figure, axes = panels(len(tasks), palette)
    for ax, task in zip(axes, tasks, strict=True):
        for algorithm in algorithms:
            runs = [it for it in results if (it.task, it.algorithm) == (task, algorithm)]
            for run in runs:
                ax.plot(run.rows(mode)[axis], run.curve(mode), color=palette[algorithm], lw=0.6, alpha=0.5)
            if runs:
                x = np.mean([run.rows(mode)[axis] for run in runs], axis=0)
                curves = np.array([[run.curve(mode)] for run in runs])
                draw_band(ax, x, estimate(iqm, curves), palette[algorithm])
        ax.set(title=task, xlabel={"step": "environment steps", "training_s": "training time"}[axis])
        ax.xaxis.set_major_formatter(EngFormatter(unit="s" if axis == "training_s" else "", sep=""))
    axes[0].set_ylabel(f"return, {mode} actions")
    return figure


def sample_efficiency(curves: dict[str, np.ndarray], steps: np.ndarray, unit: str) -> Figure:
    """
    :param curves: normalised learning curves by algorithm, shape (runs, tasks, E)
    :param steps: environment steps of the evaluations, shape (E,)
    :param unit: what the return is normalised by
    :return: interquartile mean over runs and tasks against environment steps
    """
    palette = colors(list(curves))
    figure, (ax,) = panels(1, {name: palette[name] for name in curves})
    for name, scores in curves.items():
        draw_band(ax, steps, estimate(iqm, scores), palette[name])
    ax.axhline(1, color="grey", lw=1, ls=":")
    ax.set(xlabel="environment steps", ylabel=f"normalised return, 1 is {unit}, IQM")
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def performance_profiles(finals: dict[str, np.ndarray], unit: str) -> Figure:
    """
    :param finals: normalised final returns by algorithm, shape (runs, tasks)
    :param unit: what the return is normalised by
    :return: share of runs above each threshold
    """
    scores = np.concatenate([runs.ravel() for runs in finals.values()])
    thresholds = np.linspace(min(0.0, scores.min()), scores.max() * 1.05, 101)
    palette = colors(list(finals))
    figure, (ax,) = panels(1, {name: palette[name] for name in finals})
    for name, runs in finals.items():
        draw_band(ax, thresholds, estimate(lambda it: profile(it, thresholds), runs), palette[name])
    ax.set(xlabel=f"normalised return, 1 is {unit}", ylabel="share of runs above", ylim=(-0.02, 1.02))
    return figure


def intervals(finals: dict[str, np.ndarray], func: Callable[[np.ndarray], Estimate], label: str, line: float) -> Figure:
    """
    :param finals: normalised final returns by algorithm, shape (runs, tasks)
    :param func: from final returns to what is shown
    :param label: what is shown
    :param line: where equal algorithms would be
    :return: one bar per algorithm: point and 95 % interval
    """
    palette = colors(list(finals))
    figure, ax = plt.subplots(figsize=(7.0, 0.36 * len(finals) + 1.0), layout="constrained")
    for i, (name, runs) in enumerate(finals.items()):
        value, low, high = func(runs)
        ax.barh(i, high - low, left=low, color=palette[name], alpha=0.5, height=0.6)
        ax.plot([value, value], [i - 0.3, i + 0.3], color="black")
    ax.axvline(line, color="grey", lw=1, ls=":")
    ax.set(yticks=range(len(finals)), yticklabels=list(finals), xlabel=label)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    return figure


def aggregate(finals: dict[str, np.ndarray], unit: str) -> Figure:
    """
    :param finals: normalised final returns by algorithm, shape (runs, tasks)
    :param unit: what the return is normalised by
    :return: interquartile means
    """
    return intervals(finals, lambda runs: estimate(iqm, runs), f"final normalised return, 1 is {unit}, IQM", 1.0)


def probability(finals: dict[str, np.ndarray], reference: str) -> Figure:
    """
    :param finals: normalised final returns by algorithm, shape (runs, tasks)
    :param reference: algorithm to compare with
    :return: probability of improvement over the reference
    """
    others = {name: runs for name, runs in finals.items() if name != reference}
    figure = intervals(others, lambda runs: estimate(improvement, runs, finals[reference]), f"P(better than {reference})", 0.5)
    figure.axes[0].set(xlim=(-0.03, 1.03))
    return figure
