"""``python -m benchmarks run | train | collect | tables | report | figures``"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; comparable times need pinned threads

from .executors import EXECUTORS
from .progress import Board
from .suites import ROOT, Run, check_known, read_suite, select

HERE = ROOT or Path()
RUNS, RESULTS, IMAGES = HERE / "benchmarks" / "runs", HERE / "benchmarks" / "results", HERE / "docs" / "images"


def chosen_runs(args: argparse.Namespace) -> list[Run]:
    """
    :param args: command line
    :return: the runs it asks for, checked
    """
    runs = select(read_suite(args.suite), algorithm=args.algos, task=args.tasks, seed=args.seeds)
    return [replace(run, n_timesteps=args.steps or run.n_timesteps) for run in runs]


def source_of(name: str) -> Path:
    """
    :param name: name of a suite, or path of its runs
    :return: its runs of this checkout, or else its collected results
    """
    places = (Path(name), RUNS / name, RESULTS / f"{name}.csv")
    return next((place for place in places if place.exists()), places[0])


def run(args: argparse.Namespace) -> int:
    """
    :param args: command line
    :return: exit status, 1 if a run failed
    """
    check_known("executor", [args.executor], EXECUTORS)
    runs = chosen_runs(args)
    unfinished = [run for run in runs if not run.is_finished(args.out)]
    if args.print_commands:
        print("\n".join(f"{' '.join(run.command())} --out {args.out}" for run in unfinished))
        return 0
    with Board(len(runs), len(runs) - len(unfinished), args.out) as board:
        for ended in EXECUTORS[args.executor](unfinished, args.out, args.jobs, board.step, args.address):
            board.end(ended)
    return min(board.n_failed, 1)


def train(args: argparse.Namespace) -> int:
    """
    :param args: command line
    :return: exit status, 1 if a run failed
    """
    from .runs import execute

    return int(not all([execute(run, args.out) for run in chosen_runs(args)]))


def collect(args: argparse.Namespace) -> int:
    """
    :param args: command line
    :return: exit status
    """
    from .statistics import collect

    args.out.mkdir(parents=True, exist_ok=True)
    collect(args.runs, args.out / f"{args.runs.resolve().stem}.csv")
    return 0


def tables(args: argparse.Namespace) -> int:
    """
    :param args: command line
    :return: exit status
    """
    from .report import as_markdown, tables
    from .statistics import read_results

    for title, table in tables(read_results(source_of(args.results))):
        print(f"## {title}\n\n{as_markdown(table)}")
    return 0


def report(args: argparse.Namespace) -> int:
    """
    :param args: command line
    :return: exit status
    """
    from .report import write_report

    source = source_of(args.results)
    page = args.out or RUNS / f"{source.resolve().stem}.html"
    write_report(source, page)
    print(page)
    return 0


def figures(args: argparse.Namespace) -> int:
    """
    :param args: command line
    :return: exit status
    """
    from .figures import of_pages, save

    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in of_pages(RESULTS):
        save(figure, args.out / f"{name}.png")
    return 0


def main(argv: list[str] | None = None) -> int:
    """
    :param argv: command line without the program
    :return: exit status
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    verbs = parser.add_subparsers(required=True)
    for verb, does in ((run, "train the unfinished runs of a suite"), (train, "train runs in this process, one by one")):
        sub = verbs.add_parser(verb.__name__, help=does)
        sub.set_defaults(verb=verb)
        sub.add_argument("suite", help="name in benchmarks/suites, or path of a .yml file")
        sub.add_argument("--algos", nargs="+", help="only these algorithms")
        sub.add_argument("--tasks", nargs="+", help="only these tasks")
        sub.add_argument("--seeds", nargs="+", type=int, help="only these seeds")
        sub.add_argument("--steps", type=int, help="other number of training steps")
        sub.add_argument("--out", type=lambda it: Path(it).resolve(), default=RUNS, help="folder of all runs")
        if verb is run:
            sub.add_argument("--jobs", type=int, default=1, help="runs at a time")
            sub.add_argument("--executor", default="local", help="local (processes on this machine) or ray")
            sub.add_argument("--address", help="a running Ray cluster, or auto; without it, Ray is started here")
            sub.add_argument("--print-commands", action="store_true", help="print one command per unfinished run and stop")
    sub = verbs.add_parser("collect", help="condense the runs of a suite into two CSV files")
    sub.set_defaults(verb=collect)
    sub.add_argument("runs", type=Path, help="folder of a suite's runs, as in benchmarks/runs/smoke")
    sub.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files")
    for verb, does in ((tables, "print the tables of a suite in Markdown"), (report, "write a page of tables and figures")):
        sub = verbs.add_parser(verb.__name__, help=does)
        sub.set_defaults(verb=verb)
        sub.add_argument("results", help="name of a suite with runs or results, or folder of its runs")
        if verb is report:
            sub.add_argument("--out", type=Path, help="the page; by default benchmarks/runs/NAME.html")
    sub = verbs.add_parser("figures", help="draw the pictures of the documentation")
    sub.set_defaults(verb=figures)
    sub.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures")
    args = parser.parse_args(argv)
    return int(args.verb(args))


if __name__ == "__main__":
    sys.exit(main())
