"""
Variants of QSM beside the default with the same tasks, seeds and steps, as a Markdown table: ``python -m benchmarks.variants
benchmarks/results/ablation benchmarks/results/mujoco-100k``, whose first steps are the default's runs.
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks.results import MODES, Result, read_results

Curves = dict[tuple[str, int], np.ndarray]


def learnt_curves(results: list[Result], algorithm: str, n_timesteps: int) -> Curves:
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


def ratios(ours: np.ndarray, default: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    :param ours: mean returns of a variant, shape (tasks, seeds, 2, E)
    :param default: the default's, same shape
    :return: mean over tasks of the ratio of means over seeds, deterministic and sampled: at the end, and over training
    """
    ours, default = ours.mean(axis=1), default.mean(axis=1)
    end = ours[..., -1] / default[..., -1]
    training = ours.mean(axis=-1) / default.mean(axis=-1)
    return end.mean(axis=0), training.mean(axis=0)


def table(variants: list[Result], defaults: list[Result]) -> list[list[str]]:
    """
    :param variants: results of the variants
    :param defaults: results that hold the default's, ``qsm``
    :return: titles, then a row for each: its name; for each task the last returns of each seed, deterministic / sampled; with
        all tasks and seeds, the ratios to the default at the end and over training
    :raises ValueError: if the default lacks a task or a seed
    """
    n_timesteps = variants[0].meta["cell"]["n_timesteps"]
    tasks = list(dict.fromkeys(it.task for it in variants))
    seeds = sorted({it.meta["cell"]["seed"] for it in variants})
    pairs = list(product(tasks, seeds))
    default = learnt_curves(defaults, "qsm", n_timesteps)
    if missing := [pair for pair in pairs if pair not in default]:
        raise ValueError(f"defaults lacks qsm on {missing}, expected each task and seed of the variants: {pairs}")

    def array(curves: Curves) -> np.ndarray:
        return np.array([[curves[task, seed] for seed in seeds] for task in tasks])

    rows = [["algorithm", *tasks, "end", "over training"]]
    for name in dict.fromkeys(("qsm", *(it.algorithm for it in variants))):
        curves = default if name == "qsm" else learnt_curves(variants, name, n_timesteps)
        last = {pair: " / ".join(f"{value:.0f}" for value in curve[:, -1]) for pair, curve in curves.items()}
        returns = [", ".join(last.get((task, seed), "-") for seed in seeds) for task in tasks]
        compared = ["", ""]
        if curves.keys() >= set(pairs):
            compared = [" / ".join(f"{it:.2f}" for it in ratio) for ratio in ratios(array(curves), array(default))]
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
