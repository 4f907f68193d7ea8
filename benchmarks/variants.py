"""
Variants of QSM beside the default with the same tasks, seeds and steps, as a Markdown table: ``python -m benchmarks.variants
benchmarks/results/ablation benchmarks/results/mujoco-100k``, whose first steps are the default's runs.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks.results import MODES, Result, read_results

Curves = dict[tuple[str, int], np.ndarray]


def learnt_curves(results: Iterable[Result], algorithm: str, n_timesteps: int) -> Curves:
    """
    :param results: all results
    :param algorithm: name of the algorithm, with its label
    :param n_timesteps: last step
    :return: by task and seed, mean returns of the evaluations after the random steps, shape (2, E): deterministic and sampled
    """
    curves = {}
    for it in results:
        if it.algorithm == algorithm:
            steps = it.rows(MODES[0])["step"].to_numpy()
            learnt = (steps > it.meta["cell"]["hyperparams"]["learning_starts"]) & (steps <= n_timesteps)
            curves[it.task, it.meta["cell"]["seed"]] = np.array([it.curve(mode)[learnt] for mode in MODES])
    return curves


def ratios(ours: Curves, default: Curves) -> tuple[np.ndarray, np.ndarray]:
    """
    :param ours: curves of a variant
    :param default: curves of the default, with each task and seed that the variant has
    :return: mean over tasks of the ratio of means over seeds, deterministic and sampled: at the end, and over training
    """
    tasks = dict.fromkeys(task for task, _ in ours)

    def level(curves: Curves, task: str) -> np.ndarray:
        return np.mean([curves[key] for key in ours if key[0] == task], axis=0)

    levels = [(level(ours, task), level(default, task)) for task in tasks]
    end = np.mean([our[:, -1] / its[:, -1] for our, its in levels], axis=0)
    training = np.mean([our.mean(axis=1) / its.mean(axis=1) for our, its in levels], axis=0)
    return end, training


def table(variants: list[Result], defaults: list[Result]) -> list[list[str]]:
    """
    :param variants: results of the variants
    :param defaults: results that hold the default's, ``qsm``
    :return: titles, then a row for each: its name; for each task the last returns of each seed, deterministic / sampled; with
        all tasks and seeds, the ratios to the default at the end and over training
    """
    n_timesteps = variants[0].meta["cell"]["n_timesteps"]
    tasks = dict.fromkeys(it.task for it in variants)
    seeds = sorted({it.meta["cell"]["seed"] for it in variants})
    default = learnt_curves(defaults, "qsm", n_timesteps)
    rows = [["algorithm", *tasks, "end", "over training"]]
    for name in dict.fromkeys(("qsm", *(it.algorithm for it in variants))):
        curves = default if name == "qsm" else learnt_curves(variants, name, n_timesteps)
        curves = {(task, seed): curves[task, seed] for task in tasks for seed in seeds if (task, seed) in curves}
        returns = [
            ", ".join(
                " / ".join(f"{value:.0f}" for value in curves[task, seed][:, -1]) if (task, seed) in curves else "-"
                for seed in seeds
            )
            for task in tasks
        ]
        whole = len(curves) == len(tasks) * len(seeds)
        compared = [" / ".join(f"{it:.2f}" for it in ratio) for ratio in ratios(curves, default)] if whole else ["", ""]
        rows.append([name, *returns, *compared])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variants", type=Path, help="folder of a suite of variants")
    parser.add_argument("defaults", type=Path, help="folder of a suite with the same tasks, seeds and evaluations, and qsm")
    folders = parser.parse_args()
    for row in table(read_results(folders.variants), read_results(folders.defaults)):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
