"""``python -m benchmarks run | cell | report``"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; comparable times need pinned threads

from benchmarks.executors import EXECUTORS, ROOT
from benchmarks.progress import Board
from benchmarks.suites import Cell, check_known, read_suite, select


def chosen_cells(args: argparse.Namespace) -> list[Cell]:
    """
    :param args: command line
    :return: the cells it asks for, checked
    """
    cells = select(read_suite(args.suite), algorithm=args.algos, task=args.tasks, seed=args.seeds)
    return [replace(cell, n_timesteps=args.steps or cell.n_timesteps) for cell in cells]


def run(args: argparse.Namespace) -> int:
    """
    :param args: command line
    :return: exit status, 1 if a cell failed
    """
    check_known("executor", [args.executor], EXECUTORS)
    cells = chosen_cells(args)
    unfinished = [cell for cell in cells if not cell.is_finished(args.out)]
    if args.print_commands:
        print("\n".join(f"{' '.join(cell.command())} --out {args.out}" for cell in unfinished))
        return 0
    with Board(len(cells), len(cells) - len(unfinished), args.out) as board:
        for ended in EXECUTORS[args.executor](unfinished, args.out, args.jobs, board.step, args.address):
            board.end(ended)
    return min(board.n_failed, 1)


def cell(args: argparse.Namespace) -> int:
    """
    :param args: command line
    :return: exit status, 1 if a cell failed
    """
    from benchmarks.cells import run_cell

    return int(not all([run_cell(cell, args.out) for cell in chosen_cells(args)]))


def report(args: argparse.Namespace) -> int:
    """
    :param args: command line
    :return: exit status
    """
    from benchmarks.report import write_report

    print(write_report(args.results))
    return 0


def main(argv: list[str] | None = None) -> int:
    """
    :param argv: command line without the program
    :return: exit status
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    verbs = parser.add_subparsers(required=True)
    for verb, does in ((run, "train the unfinished cells of a suite"), (cell, "train cells in this process, one by one")):
        sub = verbs.add_parser(verb.__name__, help=does)
        sub.set_defaults(verb=verb)
        sub.add_argument("suite", help="name in benchmarks/suites, or path of a .yml file")
        sub.add_argument("--algos", nargs="+", help="only these algorithms")
        sub.add_argument("--tasks", nargs="+", help="only these tasks")
        sub.add_argument("--seeds", nargs="+", type=int, help="only these seeds")
        sub.add_argument("--steps", type=int, help="other number of training steps")
        sub.add_argument(
            "--out", type=lambda path: Path(path).resolve(), default=ROOT / "benchmarks/results", help="results folder"
        )
        if verb is run:
            sub.add_argument("--jobs", type=int, default=1, help="cells at a time")
            sub.add_argument("--executor", default="local", help="local (processes on this machine) or ray")
            sub.add_argument("--address", help="a running Ray cluster, or auto; without it, Ray is started here")
            sub.add_argument("--print-commands", action="store_true", help="print one command per unfinished cell and stop")
    sub = verbs.add_parser("report", help="tables, figures and a page from a folder of results")
    sub.set_defaults(verb=report)
    sub.add_argument("results", type=Path, help="folder of one suite, as in benchmarks/results/smoke")
    args = parser.parse_args(argv)
    return args.verb(args)


if __name__ == "__main__":
    sys.exit(main())
