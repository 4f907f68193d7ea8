"""
The tables and the picture of docs/results.md from the raw files: ``python -m benchmarks.first_results``.

The full report is ``python -m benchmarks report``; this needs no more than the evaluations.
"""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results/first-defaults"
PICTURE = Path(__file__).parents[1] / "docs/images/halfcheetah_50k.png"
COLOURS = {"qsm": "tab:orange", "sac": "tab:blue"}


def curve(folder: Path, mode: str) -> np.ndarray:
    """
    :param folder: folder of one run
    :param mode: "deterministic" or "sampled"
    :return: steps and mean returns, shape (n_evaluations, 2)
    """
    with open(folder / "evaluations.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["mode"] == mode]
    returns = [[float(value) for key, value in row.items() if key.startswith("return_")] for row in rows]
    return np.array([(int(row["step"]), np.mean(values)) for row, values in zip(rows, returns, strict=True)])


def main() -> None:
    """
    Print a line of Markdown for each algorithm and mode, and draw the learning curves on HalfCheetah-v5.
    """
    for suite in ("halfcheetah-50k", "pendulum-10k", "double-pendulum-30k"):
        for algorithm in sorted((RESULTS / suite).glob("*/*")):
            for mode in ("deterministic", "sampled"):
                final = [curve(folder, mode)[-1, 1] for folder in sorted(algorithm.glob("seed*"))]
                cells = [f"`{algorithm.name}`", mode, *(f"{value:.0f}" for value in [*final, np.mean(final)])]
                print(f"{suite}: | {' | '.join(cells)} |")
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for name, colour in COLOURS.items():
        curves = [
            curve(folder, "deterministic")
            for folder in sorted((RESULTS / "halfcheetah-50k/HalfCheetah-v5" / name).glob("seed*"))
        ]
        for steps, returns in (one.T for one in curves):
            axes.plot(steps, returns, color=colour, alpha=0.35, linewidth=1)
        common = [one[one[:, 0] > 0] for one in curves]  # SAC was not evaluated before its first step
        axes.plot(
            common[0][:, 0], np.mean([one[:, 1] for one in common], axis=0), color=colour, label=f"{name}, mean of 3 seeds"
        )
    axes.set(title="HalfCheetah-v5, constructor defaults", xlabel="Environment steps", ylabel="Return, deterministic actions")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(PICTURE, dpi=150)
    print(f"picture: {PICTURE}")


if __name__ == "__main__":
    main()
