"""From finished runs to numbers with intervals, after Agarwal et al. (2021, arXiv:2108.13264)."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .algorithms import ALGORITHMS

MODES = ("deterministic", "sampled")
N_RESAMPLES = 2000
KEY = ["task", "algorithm", "seed"]
# What is kept of meta.json, in the order of the columns
COLUMNS = [
    *KEY, "n_timesteps", "hyperparams", "training_s", "steps_per_s",
    "device", "cpu", "versions", "started", "git_revision", "command",
]  # fmt: skip


@dataclass(frozen=True)
class Result:
    """
    One finished run.

    :param meta: what its meta.json says
    :param evaluations: a row for each evaluation
    """

    meta: dict[str, Any]
    evaluations: pd.DataFrame

    @property
    def task(self) -> str:
        """Environment id."""
        return str(self.meta["task"])

    @property
    def algorithm(self) -> str:
        """Name of the algorithm, with its label."""
        return str(self.meta["algorithm"])

    @property
    def seed(self) -> int:
        """Seed of the training."""
        return int(self.meta["seed"])

    @property
    def name(self) -> str:
        """Unique within the suite."""
        return f"{self.task}/{self.algorithm}/seed{self.seed}"

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
        return np.asarray(self.rows(mode).filter(regex="^return_").mean(axis=1))

    def outcomes(self, mode: str) -> np.ndarray:
        """
        :param mode: "deterministic" or "sampled"
        :return: which of its equally good ends each episode of each evaluation had, -1 for none, shape (E, episodes)
        """
        return np.asarray(self.rows(mode).filter(regex="^outcome_"), dtype=int)


def read_results(source: Path) -> list[Result]:
    """
    :param source: folder of the runs of one suite, or the CSV that :func:`collect` made of it
    :return: its finished runs: by task, algorithm in the order of ``ALGORITHMS``, seed
    :raises ValueError: if there are none, or if they were not evaluated at the same steps
    """
    if source.suffix == ".csv":
        runs = pd.read_csv(runs_file(source))
        evaluations = {key: rows for key, rows in pd.read_csv(source).groupby(KEY)}
        results = [Result(meta, evaluations[tuple(meta[key] for key in KEY)]) for meta in runs.to_dict("records")]
    else:
        files = source.glob("*/*/seed*/meta.json")
        results = [Result(json.loads(it.read_text()), pd.read_csv(it.with_name("evaluations.csv"))) for it in files]
    if not results:
        raise ValueError(f"no finished run in {source}, expected <task>/<algorithm>/seed<k>/meta.json")
    steps = {it.name: it.rows(MODES[0])["step"].tolist() for it in results}
    usual = max(steps.values(), key=list(steps.values()).count)
    if odd := {name: at for name, at in steps.items() if at != usual}:
        name, at = min(odd.items())
        raise ValueError(
            f"{name} of {source} was evaluated at the steps {at}, other runs at {usual}: expected one grid in a suite, "
            f"move what `run --steps` made to its own (--out); {len(odd)} of {len(results)} runs differ"
        )
    order = list(ALGORITHMS)
    return sorted(results, key=lambda it: (it.task, order.index(it.algorithm.split("-")[0]), it.algorithm, it.seed))


def runs_file(evaluations: Path) -> Path:
    """
    :param evaluations: a suite's CSV of evaluations
    :return: the CSV beside it with a row for each run: settings, cost, machine, command
    """
    return evaluations.with_name(f"{evaluations.stem}-runs.csv")


def collect(source: Path, target: Path) -> None:
    """
    Condense the runs of a suite into two tables: ``target`` has every return, the one beside it how each run was made.

    :param source: folder of the runs, or a CSV made before
    :param target: CSV of the evaluations
    """
    results = read_results(source)
    evaluations = [it.evaluations.assign(**{key: it.meta[key] for key in KEY}).round(2) for it in results]
    table = pd.concat(evaluations)
    table[[*KEY, *table.columns.drop(KEY)]].to_csv(target, index=False)

    def cell(value: Any) -> Any:
        return json.dumps(value) if isinstance(value, dict) else value

    rows = [{key: cell(it.meta.get(key)) for key in COLUMNS} for it in results]
    pd.DataFrame(rows).to_csv(runs_file(target), index=False)


class Estimate(NamedTuple):
    """A number, or an array of them, with its 95 % bootstrap interval: NaN where a single seed leaves none."""

    value: Any
    low: Any
    high: Any


def estimate(func: Callable[..., Any], *scores: np.ndarray) -> Estimate:
    """
    Percentile bootstrap, stratified by task: the runs of each task are drawn anew, the tasks stay.

    :param func: from scores to a number or an array
    :param scores: matrices of shape (runs, tasks, ...), one or two to compare
    :return: its value and interval
    """
    value = np.asarray(func(*scores))
    if min(map(len, scores)) == 1:
        return Estimate(value, np.nan * value, np.nan * value)
    rng = np.random.default_rng(0)

    def resample(matrix: np.ndarray) -> np.ndarray:
        runs, tasks = matrix.shape[:2]
        return matrix[rng.integers(runs, size=(runs, tasks)), np.arange(tasks)]

    resampled = [func(*map(resample, scores)) for _ in range(N_RESAMPLES)]
    return Estimate(value, *np.percentile(resampled, [2.5, 97.5], axis=0))


def iqm(scores: np.ndarray) -> Any:
    """
    Interquartile mean over runs and tasks; with fewer than four of them, the mean.

    :param scores: shape (runs, tasks) or (runs, tasks, E)
    :return: shape () or (E,)
    """
    ordered = np.sort(scores.reshape(-1, *scores.shape[2:]), axis=0)
    cut = len(ordered) // 4
    return ordered[cut : len(ordered) - cut].mean(axis=0)


def improvement(ours: np.ndarray, theirs: np.ndarray) -> Any:
    """
    Probability of improvement.

    :param ours: final scores, shape (runs, tasks)
    :param theirs: final scores of another algorithm, shape (their runs, tasks)
    :return: probability that a run of ours is better, a tie counting half, averaged over tasks
    """
    return (0.5 + 0.5 * np.sign(ours[:, None] - theirs)).mean()


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
            by_seed.setdefault(it.seed, {})[it.task] = it
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
        curves = np.array([it.curve(MODES[0]) for it in runs])
        untrained, one = float(curves[:, 0].mean()), float(curves[:, -1].mean())
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


def coverage(outcomes: np.ndarray, n_outcomes: int) -> tuple[float, float, float]:
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
