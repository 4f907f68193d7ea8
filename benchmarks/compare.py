"""Any task of Gymnasium's registry as a suite of its own, from command line to page."""

from pathlib import Path
from typing import Any

import yaml

from .algorithms import algorithm_class
from .executors import EXECUTORS
from .progress import Board
from .report import write_report
from .suites import read_suite, select

HYPERPARAMS = Path(__file__).parent / "hyperparams"


def hyperparams_of(algorithm: str, task: str, n_timesteps: int) -> dict[str, Any]:
    """
    :param algorithm: name in ``ALGORITHMS``
    :param task: environment id
    :param n_timesteps: environment steps of training
    :return: the benchmark's hyperparameters for the task, or its default ones, with random steps for a tenth of the training
        at most
    """
    file = HYPERPARAMS / f"{algorithm}.yml"
    entries = yaml.safe_load(file.read_text()) if file.exists() else {"default": {"policy": "MlpPolicy"}}
    hyperparams: dict[str, Any] = entries.get(task, entries["default"])
    learning_starts = min(hyperparams.get("learning_starts", n_timesteps), max(n_timesteps // 10, 1))
    return {**hyperparams, "learning_starts": learning_starts}


def compare(
    task: str, algorithms: list[str], n_timesteps: int, seeds: list[int], out: Path, jobs: int = 1, ray: str | None = None
) -> tuple[Path, int]:
    """
    Train the runs that are not finished, and write a page of all that are. Runs of earlier calls with other algorithms or
    seeds stay on the page.

    :param task: environment id, or ``package.module:EnvId``
    :param algorithms: names in ``ALGORITHMS``
    :param n_timesteps: environment steps of each run
    :param seeds: seeds of each algorithm
    :param out: absolute path of a folder for suite, runs and page
    :param jobs: runs at a time
    :param ray: address of a Ray cluster, "local" to start Ray here, None for processes
    :return: the page, and how many runs failed
    :raises ValueError: for an unknown algorithm, and for runs in the folder that were made with other settings
    """
    for algorithm in algorithms:
        algorithm_class(algorithm)  # before anything is written
    out.mkdir(parents=True, exist_ok=True)
    name = f"{task.replace('/', '-').replace(':', '-')}_{n_timesteps}_steps"
    suite, page = out / f"{name}.yml", out / f"{name}.html"
    before = yaml.safe_load(suite.read_text()) if suite.exists() else {"seeds": [], "algorithms": {}}
    content = {
        "n_timesteps": n_timesteps,
        "eval_freq": max(n_timesteps // 20, 1),
        "n_eval_episodes": 5,
        "seeds": sorted({*before["seeds"], *seeds}),
        "tasks": [task],
        "algorithms": before["algorithms"] | {it: {"default": hyperparams_of(it, task, n_timesteps)} for it in algorithms},
    }
    suite.write_text(yaml.safe_dump(content, sort_keys=False))
    runs = select(read_suite(str(suite)), algorithm=algorithms, seed=seeds)
    unfinished = [run for run in runs if not run.is_finished(out)]
    executor, address = EXECUTORS["local" if ray is None else "ray"], None if ray == "local" else ray
    with Board(len(runs), len(runs) - len(unfinished), out) as board:
        for ended in executor(unfinished, out, jobs, board.step, address):
            board.end(ended)
    write_report(out / name, page)
    return page, board.n_failed
