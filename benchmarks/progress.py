"""The live picture of a running matrix."""

from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.suites import Cell


class Board(Progress):
    """
    A bar for the matrix, one for each running cell, and a line that stays for each cell that ended.

    :param n_cells: number of cells asked for
    :param n_finished: how many of them were finished before
    :param out: results folder
    """

    def __init__(self, n_cells: int, n_finished: int, out: Path) -> None:
        text, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
        super().__init__(text, BarColumn(20), MofNCompleteColumn(), note, TimeElapsedColumn(), TimeRemainingColumn())
        self.out = out
        self.n_failed = 0
        self.matrix = self.add_task("cells", total=n_cells, completed=n_finished, note="")
        self.bars: dict[Path, TaskID] = {}

    def step(self, cell: Cell, step: int, mean_return: float, steps_per_s: float) -> None:
        """
        :param cell: a running cell
        :param step: environment steps done
        :param mean_return: mean return of its latest deterministic evaluation
        :param steps_per_s: speed of its training
        """
        if cell.folder not in self.bars:
            self.bars[cell.folder] = self.add_task(str(cell.folder), total=cell.n_timesteps, note="")
        self.update(self.bars[cell.folder], completed=step, note=f"return {mean_return:.1f}  {steps_per_s:.0f} steps/s")

    def end(self, cell: Cell) -> None:
        """
        :param cell: a cell that finished or failed
        """
        finished = cell.is_finished(self.out)
        self.n_failed += not finished
        note = ""
        if cell.folder in self.bars:
            bar = self.bars.pop(cell.folder)
            note = next(task.fields["note"] for task in self.tasks if task.id == bar)
            self.remove_task(bar)
        error = self.out / cell.folder / "error.txt"
        self.console.print(f"finished {cell.folder}  {note}" if finished else f"[red]failed[/red] {error}", soft_wrap=True)
        self.advance(self.matrix)
