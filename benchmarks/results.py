"""From folders of cells to numbers with intervals. The statistics are rliable's (Agarwal et al., 2021, arXiv:2108.13264)."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from rliable.library import get_interval_estimates

from benchmarks.algorithms import ALGORITHMS

MODES = ("deterministic", "sampled")
N_RESAMPLES = 2000


@dataclass(frozen=True)
class Result:
    """
    One finished cell.

    :param folder: where it lies
    :param meta: content of meta.json
    :param evaluations: content of evaluations.csv
    """

    folder: Path
    meta: dict[str, Any]
    evaluations: pd.DataFrame

    @property
    def task(self) -> str:
        """Environment id."""
        return self.meta["cell"]["task"]

    @property
    def algorithm(self) -> str:
        """Name of the algorithm, with its label."""
        return self.meta["cell"]["algorithm"]

    @property
    def name(self) -> str:
        """Unique within the suite."""
        return f"{self.task}/{self.algorithm}/{self.folder.name}"

    def rows(self, mode: str) -> pd.DataFrame:
        """
        :param mode: "deterministic" or "sampled"
        :return: the evaluations in this mode, by step
        """
        return self.evaluations[self.evaluations["mode"] == mode]

    def curve(self, mode: str) -> np.ndarray:
        """
        :param mode: "deterministic" or "sampled"
        :return: mean return of each evaluation, shape (E,)
        """
        return self.rows(mode).filter(regex="^return_").mean(axis=1).to_numpy()

    def outcomes(self, mode: str) -> np.ndarray:
        """
        :param mode: "deterministic" or "sampled"
        :return: which of its equally good ends each episode of each evaluation had, -1 for none, shape (E, episodes)
        """
        return self.rows(mode).filter(regex="^outcome_").to_numpy()


def read_results(folder: Path) -> list[Result]:
    """
    :param folder: folder of one suite
    :return: its finished cells: by task, algorithm in the order of ``ALGORITHMS``, seed
    :raises ValueError: if there are none, or if they were not evaluated at the same steps
    """
    results = [
        Result(file.parent, json.loads(file.read_text()), pd.read_csv(file.parent / "evaluations.csv"))
        for file in folder.glob("*/*/seed*/meta.json")
    ]
    if not results:
        raise ValueError(f"no finished cell in {folder}, expected <task>/<algorithm>/seed<k>/meta.json")
    steps = {it.name: it.rows("deterministic")["step"].tolist() for it in results}
    usual = max(steps.values(), key=list(steps.values()).count)
    if odd := {name: at for name, at in steps.items() if at != usual}:
        name, at = min(odd.items())
        raise ValueError(
            f"{name} of {folder} was evaluated at the steps {at}, other cells at {usual}: expected one grid in a folder, "
            f"move what `run --steps` made to its own (--out); {len(odd)} of {len(results)} cells differ"
        )
    order = list(ALGORITHMS)
    return sorted(
        results,
        key=lambda it: (it.task, order.index(it.algorithm.split("-")[0]), it.algorithm, it.meta["cell"]["seed"]),
    )


class Estimate(NamedTuple):
    """A number, or an array of them, with its 95 % stratified bootstrap interval: NaN where a single seed leaves none."""

    value: Any
    low: Any
    high: Any


def estimate(func: Callable[..., Any], *scores: np.ndarray) -> Estimate:
    """
    :param func: from scores to a number or an array
    :param scores: one matrix of shape (runs, tasks, ...), or two to compare
    :return: its value and interval
    """
    if min(map(len, scores)) == 1:
        value = np.squeeze(func(*scores))
        return Estimate(value, np.nan * value, np.nan * value)
    matrices = list(scores) if len(scores) > 1 else scores[0]
    np.random.seed(0)  # rliable draws with NumPy's own generator, whatever its random_state
    points, intervals = get_interval_estimates({"": matrices}, lambda *args: np.atleast_1d(func(*args)), reps=N_RESAMPLES)
    return Estimate(*(np.squeeze(values) for values in (points[""], *intervals[""])))


def iqm(scores: np.ndarray) -> np.ndarray:
    """
    Interquartile mean over runs and tasks; with fewer than four of them, the mean.

    :param scores: shape (runs, tasks) or (runs, tasks, E)
    :return: shape () or (E,)
    """
    # scipy's trim_mean takes a hundred times as long, thousands of times in a report
    ordered = np.sort(scores.reshape(-1, *scores.shape[2:]), axis=0)
    cut = len(ordered) // 4
    return ordered[cut : len(ordered) - cut].mean(axis=0)


def profile(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """
    Performance profile.

    :param scores: shape (runs, tasks)
    :param thresholds: shape (N,)
    :return: share of runs above each threshold, shape (N,)
    """
    return (scores[..., None] > thresholds).mean(axis=(0, 1))


def complete_runs(results: list[Result], algorithm: str, tasks: Iterable[str]) -> list[list[Result]]:
    """
    :param results: all results
    :param algorithm: an algorithm
    :param tasks: tasks
    :return: for each seed that the algorithm has on all the tasks, its results in their order
    """
    by_seed: dict[int, dict[str, Result]] = {}
    for it in results:
        if it.algorithm == algorithm:
            by_seed.setdefault(it.meta["cell"]["seed"], {})[it.task] = it
    return [[runs[task] for task in tasks] for runs in by_seed.values() if set(tasks) <= runs.keys()]


def scales(results: list[Result], reference: str) -> dict[str, tuple[float, float]]:
    """
    What counts as 0 and as 1 in the normalised return of each task: one is the reference's mean final return, deterministic,
    over the seeds that it has on all of its tasks. Zero is zero, or the untrained reference where its final return is not
    positive, as no ratio can be taken there; if training made the reference no better either, zero lies as far below one as
    one below zero (or by 1), so that more is still better. In dm_control one is 1000, the most that an episode can give.

    :param results: all results
    :param reference: algorithm to normalise by
    :return: (zero, one) by task; none if the reference has no seed on all of its tasks
    """
    found = {}
    tasks = dict.fromkeys(it.task for it in results if it.algorithm == reference)
    for runs in zip(*complete_runs(results, reference, tasks), strict=True):
        task = runs[0].task
        if task.startswith("dm_control/"):
            found[task] = (0.0, 1000.0)
            continue
        curves = np.array([it.curve("deterministic") for it in runs])
        one = float(curves[:, -1].mean())
        untrained = float(curves[:, 0].mean())
        found[task] = (0.0 if one > 0 else untrained if untrained < one else one - max(-one, 1.0), one)
    return found


def normalised(results: list[Result], scale: dict[str, tuple[float, float]], mode: str) -> dict[str, np.ndarray]:
    """
    Algorithms that have every task of ``scale`` with some seed.

    :param results: all results
    :param scale: from :func:`scales`
    :param mode: "deterministic" or "sampled"
    :return: by algorithm, normalised learning curves of shape (runs, tasks, E)
    """
    if not scale:
        return {}
    zero, one = np.array(list(scale.values())).T[..., None]
    return {
        algorithm: (np.array([[it.curve(mode) for it in of_seed] for of_seed in runs]) - zero) / (one - zero)
        for algorithm in dict.fromkeys(it.algorithm for it in results)
        if (runs := complete_runs(results, algorithm, scale))
    }


def improvement(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """
    Probability of improvement, as rliable's and many times faster.

    :param ours: final scores, shape (runs, tasks)
    :param theirs: final scores of another algorithm, shape (their runs, tasks)
    :return: probability that a run of ours is better, a tie counting half, averaged over tasks
    """
    return (0.5 + 0.5 * np.sign(ours[:, None] - theirs)).mean()


def spread(outcomes: np.ndarray, n_outcomes: int) -> tuple[float, float, float]:
    """
    How many of the equally good ends a policy keeps.

    :param outcomes: index of each episode's end, -1 for none
    :param n_outcomes: number of equally good ends
    :return: share of the ends reached at least once; entropy over ends, 1 if uniform; share of episodes that reached one
    """
    counts = np.bincount(outcomes[outcomes >= 0], minlength=n_outcomes)
    shares = counts[counts > 0] / max(counts.sum(), 1)
    entropy = -(shares * np.log(shares)).sum() / np.log(n_outcomes)
    return float((counts > 0).mean()), float(entropy), float(counts.sum() / outcomes.size)
