"""From runs to numbers, tables and a page: each against numbers by hand."""

import json
import re

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("rl_zoo3")

from benchmarks.__main__ import RESULTS, main
from benchmarks.executors import ROOT
from benchmarks.figures import of_pages
from benchmarks.report import aggregate_table, as_markdown, modes, outcome_table, return_table, seed_table, write_report
from benchmarks.statistics import (
    collect,
    coverage,
    estimate,
    improvement,
    iqm,
    normalised,
    read_results,
    runs_file,
    scales,
)
from benchmarks.suites import read_suite

COLLECTED = sorted(path.stem for path in RESULTS.glob("*.csv") if runs_file(path).exists())


def write_result(out, task, algorithm, seed, returns, outcomes=None):
    """A finished run, evaluated every hundred steps over two episodes, ``returns`` on average."""
    folder = out / "tiny" / task.replace("/", "-") / algorithm / f"seed{seed}"
    folder.mkdir(parents=True)
    rows = [
        {"step": 100 * i, "training_s": 10 * i, "mode": mode, "return_0": value - 1, "return_1": value + 1}
        for i, value in enumerate(returns)
        for mode in ("sampled", "deterministic")
    ]
    pd.DataFrame(rows).assign(**(outcomes or {})).to_csv(folder / "evaluations.csv", index=False)
    meta = {"task": task, "algorithm": algorithm, "seed": seed, "n_timesteps": 100, "hyperparams": {"policy": "MlpPolicy"}}
    meta |= {"command": f"train {task} {algorithm} {seed}", "git_revision": "abc", "device": "cpu", "started": "now"}
    meta |= {"training_s": 10.0, "steps_per_s": 12.5, "cpu": "any", "versions": {"python": "3"}}
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tasks, the second with negative returns; twice SAC on the first, half-way better on the second."""
    out = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        write_result(out, "Up-v0", "sac", seed, (0.0, 90.0 + 20 * seed))
        write_result(out, "Up-v0", "qsm", seed, (0.0, 200.0))
        write_result(out, "Down-v0", "sac", seed, (-1000.0, -200.0))
        write_result(out, "Down-v0", "qsm", seed, (-1000.0, 200.0))
    write_result(out, "Up-v0", "td3", 0, (0.0, 50.0))
    return out / "tiny"


# === Statistics ===


def test_statistics_by_hand():
    assert iqm(np.array([[0.0], [1.0], [2.0], [30.0]])) == 1.5
    assert iqm(np.array([[0.0], [1.0], [5.0]])) == 2.0, "fewer than four: the mean"
    ours, theirs = np.array([[1.0, 5.0], [3.0, 5.0]]), np.array([[2.0, 5.0], [0.0, 9.0]])
    assert improvement(ours, theirs) == pytest.approx((3 / 4 + (0.5 + 0.5) / 4) / 2)
    value, low, high = estimate(improvement, ours[:1], theirs)
    assert value == 0.375 and np.isnan([low, high]).all(), "one run says nothing about others"


def test_interval_of_a_mean():
    """A bootstrap of n normal numbers: their mean -+ 1.96 standard deviations over the root of n."""
    scores = np.random.default_rng(0).normal(size=(400, 1))
    value, low, high = estimate(np.mean, scores)
    assert value == scores.mean()
    error = scores.std() / np.sqrt(400)
    assert [(low - value) / error, (high - value) / error] == pytest.approx([-1.96, 1.96], abs=0.15)
    assert estimate(np.mean, scores) == (value, low, high), "the same every time"


def test_bootstrap_is_stratified_by_task():
    """Tasks that differ do not widen the interval; runs that differ do."""
    assert estimate(np.mean, np.array([[0.0, 100.0], [0.0, 100.0]])) == (50.0, 50.0, 50.0)
    _, low, high = estimate(np.mean, np.array([[0.0, 0.0], [100.0, 100.0]]))
    assert (low, high) == (0.0, 100.0)


def test_coverage_by_hand():
    assert coverage(np.array([0, 1, 2, 3]), 4) == pytest.approx((1.0, 1.0, 1.0))
    assert coverage(np.array([2, 2, -1, -1]), 4) == pytest.approx((0.25, 0.0, 0.5))
    assert coverage(np.array([0, 1, 0, 1]), 4) == pytest.approx((0.5, 0.5, 1.0))
    assert coverage(np.array([-1, -1]), 4) == (0.0, 0.0, 0.0)


def test_scores_are_normalised_by_sac(folder):
    results = read_results(folder)
    scale = scales(results, "sac")
    assert scale == {"Down-v0": (-1000.0, -200.0), "Up-v0": (0.0, 100.0)}
    finals = {name: curves[..., -1].tolist() for name, curves in normalised(results, scale, "deterministic").items()}
    assert finals == {"qsm": [[1.5, 2.0], [1.5, 2.0]], "sac": [[1.0, 0.9], [1.0, 1.1]]}, "td3 lacks a task"


@pytest.mark.parametrize(
    ("untrained", "final", "zero"), [(-9.0, 4.0, 0.0), (-9.0, -4.0, -9.0), (-3.0, -4.0, -8.0), (1.0, 0.0, -1.0)]
)
def test_scale_is_never_upside_down(tmp_path, untrained, final, zero):
    write_result(tmp_path, "Any-v0", "sac", 0, (untrained, final))
    assert scales(read_results(tmp_path / "tiny"), "sac") == {"Any-v0": (zero, final)}


def test_scale_of_dm_control(tmp_path):
    """Its returns have a scale of their own; a ratio to a baseline that has hardly begun to learn would be any number."""
    write_result(tmp_path, "dm_control/hopper-hop-v0", "sac", 0, (0.0, 0.2))
    assert scales(read_results(tmp_path / "tiny"), "sac") == {"dm_control/hopper-hop-v0": (0.0, 1000.0)}


def test_seed_that_lacks_a_task_is_in_no_aggregate(tmp_path):
    for seed, end in ((0, 100.0), (1, 300.0)):
        write_result(tmp_path, "Up-v0", "sac", seed, (0.0, end))
    write_result(tmp_path, "Down-v0", "sac", 0, (0.0, 50.0))
    results = read_results(tmp_path / "tiny")
    assert scales(results, "sac") == {"Down-v0": (0.0, 50.0), "Up-v0": (0.0, 100.0)}
    (row,) = aggregate_table(results, "deterministic")
    assert (row["final return"], row["seeds"]) == ("1", 1)
    assert [it.name for it in row["runs"]] == ["Down-v0/sac/seed0", "Up-v0/sac/seed0"]


def test_runs_with_two_evaluation_grids_are_refused(tmp_path):
    for seed in (0, 1):
        write_result(tmp_path, "Any-v0", "sac", seed, (0.0, 40.0))
    write_result(tmp_path, "Any-v0", "qsm", 3, (0.0, 20.0, 40.0))
    with pytest.raises(ValueError, match=r"Any-v0/qsm/seed3 .* \[0, 100, 200\], other runs at \[0, 100\]: .* 1 of 3 runs"):
        read_results(tmp_path / "tiny")


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no finished run in .*expected"):
        read_results(tmp_path)


# === Tables and page ===


def test_tables_by_hand(folder):
    results = read_results(folder)
    assert as_markdown(return_table(results, "deterministic")) == (
        "| task | qsm | sac | td3 |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| Down-v0 | 200 [200, 200] | -200 [-200, -200] |  |\n"
        "| Up-v0 | 200 [200, 200] | 100 [90, 110] | 50 |\n"
        "| all tasks / sac | 1.75 [1.75, 1.75] | 1 [0.95, 1.05] |  |\n"
    )
    seeds = {(row["task"], row["algorithm"]): row for row in seed_table(results, "sampled")}
    assert seeds["Up-v0", "sac"]["final return"] == "90, 110"
    assert (seeds["Up-v0", "qsm"]["seeds"], seeds["Up-v0", "qsm"]["final return / sac"]) == ("0, 1", "2")
    assert (seeds["Up-v0", "td3"]["mean over training"], seeds["Up-v0", "td3"]["mean over training / sac"]) == ("25", "0.5")
    assert seeds["Down-v0", "qsm"]["final return / sac"] == "", "no ratio to a negative return"


def test_outcomes_are_in_the_report(tmp_path):
    write_result(tmp_path, "MultiGoal-v0", "qsm", 0, (0.0, -120.0), {"outcome_0": 2, "outcome_1": -1})
    (row,) = outcome_table(read_results(tmp_path / "tiny"), "sampled")
    assert (row["share of goals reached"], row["episodes that reach one"], row["final return"]) == (0.25, 0.5, -120.0)


def test_collected_results_are_the_runs(folder, tmp_path):
    assert main(["collect", str(folder), "--out", str(tmp_path)]) == 0
    runs, collected = read_results(folder), read_results(tmp_path / "tiny.csv")
    assert [it.name for it in runs] == [it.name for it in collected]
    for mode in ("deterministic", "sampled"):
        assert all(np.array_equal(a.curve(mode), b.curve(mode)) for a, b in zip(runs, collected, strict=True))
        assert as_markdown(return_table(runs, mode)) == as_markdown(return_table(collected, mode))
    assert [it.meta["command"] for it in collected] == [it.meta["command"] for it in runs]
    assert json.loads(collected[0].meta["versions"]) == {"python": "3"}
    again = tmp_path / "again.csv"
    collect(tmp_path / "tiny.csv", again)
    assert again.read_bytes() == (tmp_path / "tiny.csv").read_bytes()


def test_report_traces_every_number(folder, tmp_path):
    write_report(folder, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    links = set(re.findall(r'href="#([^"]+)"', text))
    assert links == set(re.findall(r'<tr id="([^"]+)"', text)) and len(links) == 9, "each run"
    assert all(f"train {task} {name} {seed}" in text for task, name, seed in [("Up-v0", "td3", 0), ("Down-v0", "qsm", 1)])
    assert not re.search(r'(src|href)="(?!data:|#)', text), "self-contained"
    assert text.count("<figure>") == 5
    assert "in no aggregate: td3" in text


def test_report_of_an_unfinished_suite(tmp_path):
    """No seed of the reference has all tasks: the tables of single tasks are there, and the page says what is missing."""
    for task, seed in (("Up-v0", 0), ("Down-v0", 1)):
        for algorithm in ("sac", "qsm"):
            write_result(tmp_path, task, algorithm, seed, (0.0, 90.0))
    failed = tmp_path / "tiny" / "Up-v0" / "td3" / "seed0"
    failed.mkdir(parents=True)
    (failed / "error.txt").write_text("Traceback")
    write_report(tmp_path / "tiny", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "No seed of sac has all of its tasks: no aggregate." in text and "Failed: Up-v0/td3/seed0." in text
    assert text.count("<figure>") == 3


# === What the repository holds ===


@pytest.mark.parametrize("suite", COLLECTED)
def test_results_are_of_the_suites_settings(suite):
    if suite.startswith("dmc"):
        pytest.importorskip("shimmy")
        pytest.importorskip("dm_control")
    settings = {(run.task, run.algorithm): (run.n_timesteps, run.hyperparams) for run in read_suite(suite)}
    for it in read_results(RESULTS / f"{suite}.csv"):
        made = (it.meta["n_timesteps"], json.loads(it.meta["hyperparams"]))
        assert made == settings[it.task, it.algorithm], it.name


def test_results_are_small():
    assert len(COLLECTED) >= 3
    assert sum(path.stat().st_size for path in RESULTS.iterdir()) < 2e6


@pytest.mark.parametrize("suite", COLLECTED)
def test_results_page_has_the_measured_numbers(suite):
    results = read_results(RESULTS / f"{suite}.csv")
    table = outcome_table if suite == "multimodal" else return_table
    assert as_markdown(table(results, modes(results)[0])) in (ROOT / "docs" / "results.md").read_text()


def test_pictures_of_the_pages_are_drawn_from_the_results():
    names = {name for name, _ in of_pages(RESULTS)}
    assert {f"{name}.png" for name in names} | {"four_goals.png", "four_ways.png", "denoising.gif", "robots.gif"} == {
        it.name for it in (ROOT / "docs" / "images").iterdir()
    }
