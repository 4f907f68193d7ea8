"""Tables of a suite, and one page in which every summary links to its runs and every run has its command."""

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from . import figures
from .environments import N_OUTCOMES
from .statistics import (
    MODES,
    N_RESAMPLES,
    Estimate,
    Result,
    complete_runs,
    coverage,
    estimate,
    improvement,
    iqm,
    normalised,
    read_results,
    scales,
)

Row = dict[str, Any]
# Of learning curves, shape (..., E)
SUMMARIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "final return": lambda curves: curves[..., -1],
    "mean over training": lambda curves: np.asarray(curves.mean(axis=-1)),
}


def number(value: float) -> str:
    """
    :param value: any number
    :return: the same with three digits, or all before the point
    """
    return "" if np.isnan(value) else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def interval(it: Estimate) -> str:
    """
    :param it: a number with its interval
    :return: both, or only the number where a single seed leaves no interval
    """
    return number(it.value) + ("" if np.isnan(it.low) else f" [{number(it.low)}, {number(it.high)}]")


def by_task(results: list[Result]) -> Iterator[tuple[str, str, list[Result]]]:
    """
    :param results: all results
    :return: task, algorithm and the results of each pair that has any
    """
    for task, algorithm in dict.fromkeys((it.task, it.algorithm) for it in results):
        yield task, algorithm, [it for it in results if (it.task, it.algorithm) == (task, algorithm)]


def modes(results: list[Result]) -> list[str]:
    """
    :param results: all results
    :return: the ways of acting that all were evaluated with
    """
    return [mode for mode in MODES if all(len(it.rows(mode)) for it in results)]


def reference_of(results: list[Result]) -> str:
    """
    :param results: all results
    :return: the algorithm that the others are compared with: SAC, or the first
    """
    algorithms = [it.algorithm for it in results]
    return "sac" if "sac" in algorithms else algorithms[0]


def return_table(results: list[Result], mode: str) -> list[Row]:
    """
    Final returns, interquartile mean over seeds with its 95 % interval; whichever is more, tasks or algorithms, goes down.

    :param results: all results
    :param mode: "deterministic" or "sampled"
    :return: one row for each task, or for each algorithm, and the normalised return of all tasks together
    """
    reference = reference_of(results)
    cells = {
        (task, algorithm): interval(estimate(iqm, np.array([[run.curve(mode)[-1]] for run in runs])))
        for task, algorithm, runs in by_task(results)
    }
    tasks, algorithms = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    together = "all tasks / 1000" if tasks[0].startswith("dm_control/") else f"all tasks / {reference}"
    if len(tasks) > 1:
        for algorithm, curves in normalised(results, scales(results, reference), mode).items():
            cells[together, algorithm] = interval(estimate(iqm, curves[..., -1]))
        tasks.append(together)
    if len(algorithms) > len(tasks):
        return [{"algorithm": it, **{task: cells.get((task, it), "") for task in tasks}} for it in algorithms]
    return [{"task": task, **{it: cells.get((task, it), "") for it in algorithms}} for task in tasks]


def seed_table(results: list[Result], mode: str) -> list[Row]:
    """
    :param results: all results
    :param mode: "deterministic" or "sampled"
    :return: a row for each task and algorithm: returns of each seed
    """
    reference = reference_of(results)
    curves = {(task, name): np.array([run.curve(mode) for run in runs]) for task, name, runs in by_task(results)}
    table = []
    for task, algorithm, runs in by_task(results):
        row: Row = {"task": task, "algorithm": algorithm, "seeds": ", ".join(str(run.seed) for run in runs)}
        for column, summary in SUMMARIES.items():
            values = summary(curves[task, algorithm])
            row[column] = ", ".join(map(number, values))
            level = iqm(summary(curves[task, reference])[:, None]) if (task, reference) in curves else 0.0
            row[f"{column} / {reference}"] = number(iqm(values[:, None]) / level) if level > 0 else ""
        table.append(row | {"runs": runs})
    return table


def aggregate_table(results: list[Result], mode: str) -> list[Row]:
    """
    :param results: all results
    :param mode: "deterministic" or "sampled"
    :return: a row for each algorithm that has every task of the reference
    """
    reference = reference_of(results)
    scale = scales(results, reference)
    curves = normalised(results, scale, mode)
    table = []
    for algorithm, scores in curves.items():
        row: Row = {"algorithm": algorithm, "seeds": len(scores)}
        for column, summary in SUMMARIES.items():
            row[column] = interval(estimate(iqm, summary(scores)))
        better = estimate(improvement, scores[..., -1], curves[reference][..., -1])
        row[f"P(better than {reference})"] = "" if algorithm == reference else interval(better)
        table.append(row | {"runs": [it for seed in complete_runs(results, algorithm, scale) for it in seed]})
    return table


def outcome_table(results: list[Result], mode: str) -> list[Row]:
    """
    :param results: all results
    :param mode: "deterministic" or "sampled"
    :return: a row for each environment with several good answers and algorithm; means over seeds
    """
    table = []
    for task, algorithm, runs in by_task(results):
        if task in N_OUTCOMES:
            ends = np.mean([coverage(run.outcomes(mode)[-1], N_OUTCOMES[task]) for run in runs], axis=0)
            names = ("share of goals reached", "entropy over goals", "episodes that reach one")
            row: Row = {"task": task, "algorithm": algorithm, "seeds": len(runs), **dict(zip(names, ends, strict=True))}
            table.append(row | {"final return": np.mean([run.curve(mode)[-1] for run in runs]), "runs": runs})
    return table


def cost_table(results: list[Result]) -> list[Row]:
    """
    :param results: all results
    :return: a row for each task, algorithm and machine: medians
    """
    table = []
    for task, algorithm, all_runs in by_task(results):
        for machine in dict.fromkeys((it.meta["cpu"], it.meta["device"]) for it in all_runs):
            runs = [it for it in all_runs if (it.meta["cpu"], it.meta["device"]) == machine]
            row: Row = {"task": task, "algorithm": algorithm, "machine": ", ".join(machine)}
            row["steps/s"], row["training s"] = (
                float(np.median([it.meta[key] for it in runs])) for key in ("steps_per_s", "training_s")
            )
            table.append(row | {"runs": runs})
    return table


def text(value: Any) -> str:
    """
    :param value: content of a table
    :return: the same for a reader
    """
    return number(float(value)) if isinstance(value, float) else str(value)


def as_markdown(table: list[Row]) -> str:
    """
    :param table: rows
    :return: the table in Markdown, without the links to runs
    """
    keys = [key for key in table[0] if key != "runs"]
    lines = [keys, ["---", *["---:"] * (len(keys) - 1)], *([text(row[key]) for key in keys] for row in table)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def notes(results: list[Result]) -> list[str]:
    """
    :param results: all results
    :return: what a reader must know before believing a number
    """
    reference = reference_of(results)
    scale = scales(results, reference)
    seeds = sorted({len(runs) for _, _, runs in by_task(results)})
    missing = sorted({it.algorithm for it in results} - set(normalised(results, scale, MODES[0])))
    unit = ", ".join(f"{task}: 0 is {zero:.0f} and 1 is {one:.0f}" for task, (zero, one) in scale.items())
    said = [
        f"Return normalised by {reference}. {unit}."
        if scale
        else f"No seed of {reference} has all of its tasks: no aggregate.",
        "Interquartile mean over seeds (fewer than four: mean) and its 95 % interval, by a bootstrap stratified by task with "
        f"{N_RESAMPLES} resamples.",
        f"Seeds per task and algorithm: {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))}."
        + (" With fewer than 5, intervals are too narrow; with one there are none." if seeds[0] < 5 else ""),
    ]
    return said + ([f"Without all tasks, hence in no aggregate: {', '.join(missing)}."] if missing else [])


def draw(results: list[Result]) -> Iterator[tuple[str, Figure]]:
    """
    :param results: all results
    :return: caption and figure, one after the other
    """
    for mode in modes(results):
        yield f"Learning curves, {mode} actions. Band: 95 % interval.", figures.learning_curves(results, mode)
    yield "Wall-clock, evaluation not counted.", figures.learning_curves(results, MODES[0], "training_s")
    reference = reference_of(results)
    if len({it.task for it in results}) > 1 and scales(results, reference):
        yield "All tasks together.", figures.sample_efficiency(results, reference)
        yield "Final return. Bar: 95 % interval.", figures.intervals(results, reference)


def tables(results: list[Result]) -> Iterator[tuple[str, list[Row]]]:
    """
    :param results: all results
    :return: title and rows of each table that has any
    """
    for mode in modes(results):
        for title, table in (
            ("Final return", return_table),
            ("All tasks together", aggregate_table),
            ("Several good answers", outcome_table),
            ("Each seed", seed_table),
        ):
            if rows := table(results, mode):
                yield f"{title}, {mode} actions", rows
    yield "Cost", cost_table(results)


def write_report(source: Path, page: Path) -> None:
    """
    :param source: folder of the runs of one suite, or its collected CSV
    :param page: HTML file to write; it holds its figures, and links nowhere
    """
    results = read_results(source)

    def image(figure: Figure) -> str:
        buffer = io.BytesIO()
        figures.save(figure, buffer)
        return base64.b64encode(buffer.getvalue()).decode()

    failed = [] if source.suffix else sorted(str(it.parent.relative_to(source)) for it in source.glob("*/*/seed*/error.txt"))
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(
        Path(__file__).with_name("report.html").read_text()
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(
        template.render(
            title=f"Benchmark {source.resolve().stem}",
            notes=notes(results) + ([f"Failed: {', '.join(failed)}."] if failed else []),
            figures=[(caption, image(figure)) for caption, figure in draw(results)],
            tables=list(tables(results)),
            results=results,
            text=text,
        )
    )
