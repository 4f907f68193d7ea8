"""Tables, figures and one page from a folder of results. Each summary names its cells, each cell its command."""

import base64
import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks import figures
from benchmarks.pictures import world_pictures
from benchmarks.results import (
    MODES,
    N_RESAMPLES,
    Result,
    complete_runs,
    estimate,
    improvement,
    iqm,
    normalised,
    read_results,
    scales,
    spread,
)
from benchmarks.worlds import N_OUTCOMES

Row = dict[str, Any]
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1, h2 { line-height: 1.2 } h2 { margin-top: 3rem } img { max-width: 100%; display: block } figure { margin: 1.5rem 0 }
figcaption, .note { color: #555; max-width: 60rem } .wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .2rem .7rem; border-bottom: 1px solid #ddd; white-space: nowrap }
th { border-bottom: 2px solid #888 } td.text, th.text { text-align: left } tr:target { background: #fff3bf }
code { font-size: .8rem } a { color: #1864ab; text-decoration: none }
"""


def by_task(results: list[Result]) -> Iterator[tuple[str, str, list[Result]]]:
    """
    :param results: all results
    :return: task, algorithm and the results of each pair that has any
    """
    for task, algorithm in dict.fromkeys((it.task, it.algorithm) for it in results):
        yield task, algorithm, [it for it in results if (it.task, it.algorithm) == (task, algorithm)]


def task_table(results: list[Result], reference: str) -> list[Row]:
    """
    :param results: all results
    :param reference: algorithm whose final level the others are to reach
    :return: a row for each task, algorithm and way of acting
    """
    table = []
    levels = {
        (task, mode): float(iqm(np.array([[run.curve(mode)[-1]] for run in runs])))
        for task, algorithm, runs in by_task(results)
        for mode in MODES
        if algorithm == reference
    }
    for task, algorithm, runs in by_task(results):
        for mode in MODES:
            curves = np.array([[run.curve(mode)] for run in runs])
            final, area = estimate(iqm, curves[..., -1]), estimate(iqm, curves.mean(axis=-1))
            row: Row = {"task": task, "algorithm": algorithm, "actions": mode, "seeds": len(runs)}
            row |= {"final return": final.value, "95% low": final.low, "95% high": final.high}
            row |= {"mean over training": area.value, "its 95% low": area.low, "its 95% high": area.high}
            # The first evaluation at which the summary curve is where the reference ends
            reached = np.flatnonzero(iqm(curves) >= levels.get((task, mode), np.inf))
            steps, seconds = (np.mean([run.rows(mode)[key] for run in runs], axis=0) for key in ("step", "training_s"))
            row[f"steps to {reference}'s end"] = int(steps[reached[0]]) if len(reached) else "-"
            row[f"seconds to {reference}'s end"] = int(seconds[reached[0]]) if len(reached) else "-"
            table.append(row | {"cells": runs})
    return table


def seed_table(results: list[Result], reference: str) -> list[Row]:
    """
    :param results: all results
    :param reference: algorithm that the others are compared with
    :return: a row for each task and algorithm: returns of each seed, and in brackets the ratio of their interquartile mean to
        the reference's, where that is positive
    """
    columns = {
        (task, algorithm): {
            f"{title}, {mode}": np.array([summary(run.curve(mode)) for run in runs])
            for title, summary in (("end", lambda curve: curve[-1]), ("mean over training", np.mean))
            for mode in MODES
        }
        for task, algorithm, runs in by_task(results)
    }
    table = []
    for task, algorithm, runs in by_task(results):
        row: Row = {"task": task, "algorithm": algorithm, "seeds": ", ".join(str(run.meta["cell"]["seed"]) for run in runs)}
        for title, returns in columns[task, algorithm].items():
            rival = columns.get((task, reference), {}).get(title)
            level = 0.0 if rival is None or algorithm == reference else iqm(rival[:, None])
            ratio = f" ({iqm(returns[:, None]) / level:.2f})" if level > 0 else ""
            row[title] = ", ".join(map(text, returns)) + ratio
        table.append(row)
    return table


def aggregate_table(results: list[Result], scale: dict[str, tuple[float, float]], reference: str) -> list[Row]:
    """
    :param results: all results
    :param scale: zero and one of each task
    :param reference: algorithm that the others are compared with
    :return: a row for each way of acting and algorithm
    """
    table = []
    for mode in MODES:
        curves = normalised(results, scale, mode)
        for algorithm, runs in curves.items():
            final, area = estimate(iqm, runs[..., -1]), estimate(iqm, runs.mean(axis=-1))
            better = estimate(improvement, runs[..., -1], curves[reference][..., -1])
            row: Row = {"algorithm": algorithm, "actions": mode, "tasks": len(scale), "seeds": len(runs)}
            row |= {"final": final.value, "95% low": final.low, "95% high": final.high}
            row |= {"mean over training": area.value, "its 95% low": area.low, "its 95% high": area.high}
            if algorithm != reference:
                row |= {f"P(better than {reference})": better.value, "P 95% low": better.low, "P 95% high": better.high}
            table.append(row | {"cells": [it for of_seed in complete_runs(results, algorithm, scale) for it in of_seed]})
    return table


def cost_table(results: list[Result]) -> list[Row]:
    """
    :param results: all results
    :return: a row for each task, algorithm and machine
    """
    table = []
    for task, algorithm, all_runs in by_task(results):
        for machine in dict.fromkeys((it.meta["machine"]["cpu"], it.meta["device"]) for it in all_runs):
            runs = [it for it in all_runs if (it.meta["machine"]["cpu"], it.meta["device"]) == machine]
            speed, minutes, memory, action = (
                [it.meta.get(key, np.nan) / unit for it in runs]
                for key, unit in (("steps_per_s", 1), ("training_s", 60), ("peak_memory_mb", 1), ("ms_per_action", 1))
            )
            row: Row = {"task": task, "algorithm": algorithm, "machine": machine[0], "device": machine[1]}
            row |= {"steps/s, median": np.median(speed), "slowest": min(speed), "fastest": max(speed)}
            row |= {"ms per action, median": np.nanmedian(action) if np.isfinite(action).any() else "-"}
            row |= {"training min, median": np.median(minutes), "peak MB, largest": max(memory), "cells": runs}
            table.append(row)
    return table


def outcome_table(results: list[Result]) -> list[Row]:
    """
    :param results: all results
    :return: a row for each world with several good answers, algorithm and way of acting; means over seeds
    """
    table = []
    for task, algorithm, runs in by_task(results):
        for mode in MODES if task in N_OUTCOMES else ():
            spreads = [spread(run.outcomes(mode)[-1], N_OUTCOMES[task]) for run in runs]
            share, entropy, success = np.mean(spreads, axis=0)
            row: Row = {"task": task, "algorithm": algorithm, "actions": mode, "seeds": len(runs)}
            row |= {"share of goals reached": share, "entropy over goals": entropy, "episodes that reach one": success}
            row |= {"final return": np.mean([run.curve(mode)[-1] for run in runs])}
            table.append(row | {"cells": runs})
    return table


def cell_table(results: list[Result]) -> list[Row]:
    """
    :param results: all results
    :return: a row for each cell
    """
    return [
        {
            "cell": it.name,
            "final, deterministic": it.curve("deterministic")[-1],
            "final, sampled": it.curve("sampled")[-1],
            "steps": int(it.evaluations["step"].max()),
            "training s": it.meta["training_s"],
            "steps/s": it.meta["steps_per_s"],
            "peak MB": it.meta["peak_memory_mb"],
            "started": it.meta["started"],
            "git revision": it.meta["git_revision"],
            "command": it.meta["command"],
            "hyperparameters": json.dumps(it.meta["cell"]["hyperparams"]),
            "machine": f"{it.meta['machine']['cpu']}, {it.meta['machine']['threads']} thread, {it.meta['device']}",
            "versions": " ".join(f"{name} {version}" for name, version in it.meta["versions"].items()),
        }
        for it in results
    ]


def text(value: Any) -> str:
    """
    :param value: content of a table
    :return: the same for a reader
    """
    if isinstance(value, list):
        return " ".join(it.name if isinstance(it, Result) else str(it) for it in value)
    if isinstance(value, float | np.floating | np.ndarray):
        number = float(value)
        if np.isnan(number):
            return ""
        return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.3g}"
    return str(value)


def as_html(table: list[Row]) -> str:
    """
    :param table: rows
    :return: the table, its cells linked to the list of cells
    """

    def content(key: str, value: Any) -> str:
        if key == "cells":
            return " ".join(f'<a href="#{html.escape(it.name)}">{html.escape(it.folder.name[4:])}</a>' for it in value)
        if key == "command" or key == "git revision":
            return f"<code>{html.escape(str(value))}</code>"
        return html.escape(text(value))

    keys = list(dict.fromkeys(key for row in table for key in row))
    kind = {key: ' class="text"' if isinstance(table[0].get(key), str | list) else "" for key in keys}
    lines = ["<tr>" + "".join(f"<th{kind[key]}>{html.escape(key)}</th>" for key in keys) + "</tr>"]
    for row in table:
        anchor = f' id="{html.escape(row["cell"])}"' if "cell" in row else ""
        lines.append(
            f"<tr{anchor}>" + "".join(f"<td{kind[key]}>{content(key, row.get(key, ''))}</td>" for key in keys) + "</tr>"
        )
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def save_table(table: list[Row], name: str, folder: Path) -> None:
    """
    :param table: rows
    :param name: name of the files
    :param folder: where they go, as CSV with all digits and as Markdown
    """
    frame = pd.DataFrame(
        [{key: text(value) if isinstance(value, list) else value for key, value in row.items()} for row in table]
    )
    frame.to_csv(folder / f"{name}.csv", index=False)
    lines = [list(frame.columns), ["---"] * len(frame.columns), *(map(text, row) for row in frame.fillna("").to_numpy())]
    (folder / f"{name}.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


def notes(results: list[Result], folder: Path, scale: dict[str, tuple[float, float]], reference: str) -> list[str]:
    """
    :param results: all results
    :param folder: folder of the suite
    :param scale: zero and one of each task
    :param reference: algorithm to normalise by
    :return: what a reader must know before believing a number
    """
    seeds = [len(runs) for _, _, runs in by_task(results)]
    left_out = sorted({it.algorithm for it in results} - set(normalised(results, scale, "deterministic")))
    several = {key: sorted({str(it.meta[key]) for it in results}) for key in ("git_revision", "device")}
    machines = sorted({it.meta["machine"]["cpu"] for it in results})
    episodes = sorted({it.meta["cell"]["n_eval_episodes"] for it in results})
    said = [
        f"Each evaluation: {' or '.join(map(str, episodes))} episodes from the same start states, on a separate environment.",
        f"Normalised return: 1 is {unit(scale, reference)}; 0 is "
        + ", ".join(f"{zero:.0f} on {task} (1 is {one:.0f})" for task, (zero, one) in scale.items())
        + "."
        if scale
        else f"No aggregate: no seed of {reference} has all of its tasks.",
        f"Intervals: 95 %, stratified bootstrap over seeds, {N_RESAMPLES} resamples.",
        "IQM: interquartile mean; with fewer than four scores, the mean.",
        f"Machines: {', '.join(machines)}. Devices: {', '.join(several['device'])}.",
        f"Code: {', '.join(several['git_revision'])}"
        + (" (-dirty: with changes not committed)." if "dirty" in str(several) else "."),
    ]
    if min(seeds) < 5:
        said.append(
            f"Seeds per task and algorithm: {' to '.join(map(str, sorted({min(seeds), max(seeds)})))}. "
            "With fewer than 5, intervals are too narrow; with one there are none."
        )
    if left_out and scale:
        said.append(f"Without all of {', '.join(scale)}, hence in no aggregate: {', '.join(left_out)}.")
    failed = sorted(str(file.parent.relative_to(folder)) for file in folder.glob("*/*/seed*/error.txt"))
    return said + ([f"Failed cells: {', '.join(failed)}."] if failed else [])


def unit(scale: dict[str, tuple[float, float]], reference: str) -> str:
    """
    :param scale: zero and one of each task
    :param reference: algorithm to normalise by
    :return: what one is in a normalised return
    """
    return "1000" if all(one == 1000.0 for _, one in scale.values()) else f"{reference}'s mean end, deterministic"


def draw(results: list[Result], scale: dict[str, tuple[float, float]], reference: str) -> Iterator[tuple[str, str, Figure]]:
    """
    :param results: all results
    :param scale: zero and one of each task
    :param reference: algorithm to normalise by
    :return: name, caption and figure, one after the other
    """
    lines = "Thin: one seed. Thick: interquartile mean. Band: its 95 % interval."
    yield "curves-steps", f"Sample efficiency. {lines}", figures.learning_curves(results, "deterministic", "step")
    yield "curves-sampled", f"The same with sampled actions. {lines}", figures.learning_curves(results, "sampled", "step")
    yield (
        "curves-time",
        f"Wall-clock, evaluation not counted. {lines}",
        figures.learning_curves(results, "deterministic", "training_s"),
    )
    curves = normalised(results, scale, "deterministic")
    finals = {name: runs[..., -1] for name, runs in curves.items()}
    if curves:
        one, steps = unit(scale, reference), results[0].rows("deterministic")["step"].to_numpy()
        yield "efficiency", "All tasks together.", figures.sample_efficiency(curves, steps, one)
        yield "aggregate", "Final return. Line: interquartile mean. Bar: 95 % interval.", figures.aggregate(finals, one)
        yield (
            "profiles",
            "Performance profiles: higher is better at every threshold.",
            figures.performance_profiles(finals, one),
        )
    if len(finals) > 1:
        caption = f"Probability that a run is better than a run of {reference} on the same task."
        yield "probability", caption, figures.probability(finals, reference)
    yield from world_pictures(results)


def write_report(folder: Path) -> Path:
    """
    :param folder: folder of one suite, as in benchmarks/results/smoke
    :return: path of the page, beside which lie the figures as PNG and the tables as CSV and Markdown
    """
    results = read_results(folder)
    out = folder / "report"
    out.mkdir(exist_ok=True)
    algorithms = list(dict.fromkeys(it.algorithm for it in results))
    reference = "sac" if "sac" in algorithms else algorithms[0]
    scale = scales(results, reference)
    tables = {
        "aggregate": ("All tasks together", aggregate_table(results, scale, reference)),
        "seeds": ("Each seed", seed_table(results, reference)),
        "tasks": ("Each task", task_table(results, reference)),
        "outcomes": ("Several good answers", outcome_table(results)),
        "cost": ("Cost", cost_table(results)),
        "cells": ("Cells", cell_table(results)),
    }
    said = [
        f"{len(results)} cells; the seeds in the last column of each table link to them.",
        *notes(results, folder, scale, reference),
    ]
    page = [f"<p class='note'>{html.escape(note)}</p>" for note in said]
    pictures = []
    for name, caption, figure in draw(results, scale, reference):
        figure.savefig(out / f"{name}.png", dpi=130)
        plt.close(figure)
        image = base64.b64encode((out / f"{name}.png").read_bytes()).decode()
        caption = html.escape(caption)
        pictures.append(
            f'<figure><img src="data:image/png;base64,{image}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
        )
    for name, (title, table) in tables.items():
        if table:
            save_table(table, name, out)
            page.append(f"<h2>{title}</h2>\n{as_html(table)}")
        page += pictures if name == "aggregate" else []
    title = html.escape(f"Benchmark {folder.resolve().name}")
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>'
    (out / "index.html").write_text("\n".join([head, *page, "</html>\n"]))
    return out / "index.html"
