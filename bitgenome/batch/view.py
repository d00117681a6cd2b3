"""Shows a batch: as a line for every change in a log, as a live table on a terminal."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from bitgenome.batch.state import RunState, Stage

STYLES = {Stage.WAITING: "dim", Stage.FINISHED: "green", Stage.FAILED: "red"}


class BatchView:
    """Shows the runs of a batch; ``changed`` is called for every run that changes."""

    def __init__(self, states: Sequence[RunState], console: Console):
        self.states, self.console = states, console
        self._live: Live | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the live table while the context lasts, if there is a terminal."""
        if not self.console.is_terminal:
            yield
            return
        with Live(get_renderable=self.table, console=self.console, refresh_per_second=2, transient=True) as self._live:
            yield

    def begun(self) -> None:
        """Print the number of runs, and which are finished already."""
        finished = [state.name for state in self.states if state.stage is Stage.FINISHED]
        self.console.print(f"{len(self.states)} runs, {len(finished)} of them finished already", markup=False)
        for name in finished:
            self.console.print(f"{name}: finished already", soft_wrap=True, markup=False)

    def changed(self, state: RunState, summary: str = "") -> None:
        """Show a run that has changed; ``summary`` is the line of a finished one."""
        if self._live is None or state.stage in (Stage.FINISHED, Stage.FAILED):
            self.console.print(line(state, summary), soft_wrap=True, markup=False)

    def table(self) -> Table:
        """Return a table of all runs."""
        done = sum(state.stage is Stage.FINISHED for state in self.states)
        title = f"{done} of {len(self.states)} runs finished"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in ("run", "state", "generation", "best loss", "tried", "left"):
            table.add_column(
                column,
                justify="left" if column in ("run", "state") else "right",
                overflow="fold",
                no_wrap=column != "state",
            )
        for state in self.states:
            generation, loss, genomes, left = figures(state)
            doing = state.doing if state.doing not in ("", "search") else str(state.stage)
            table.add_row(state.name, doing, generation, loss, genomes, left, style=STYLES.get(state.stage))
        return table


def figures(state: RunState) -> tuple[str, str, str, str]:
    """Return generation, best loss, evaluations and time left as text, "" while unknown."""
    if state.best_loss is None:
        return "", "", "", ""
    left = state.seconds_left
    return (
        f"{state.generation}/{state.generations}",
        f"{state.best_loss:.6f}",
        f"{state.genomes}",
        "" if left is None else duration(left),
    )


def duration(seconds: float) -> str:
    """Return a duration in seconds as text, such as 40 s, 12 min or 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def line(state: RunState, summary: str) -> str:
    """Return one line on the state of a run."""
    said = f"{state.name}: {state.stage}"
    if state.stage is Stage.FAILED:
        return f"{said}: {state.sentence}"
    if state.stage is Stage.FINISHED:
        return f"{said}: {summary}"
    if state.doing and state.doing != "search":
        said += f", {state.doing}"
    generation, loss, genomes, left = figures(state)
    if generation and state.stage is Stage.SEARCHING:
        said += f", generation {generation}, best loss {loss}, {genomes} evaluations"
    return said + (f", about {left} left" if left else "")
