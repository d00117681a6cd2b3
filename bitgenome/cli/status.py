"""Defines ``bitgenome status``, which shows what runs are doing from their directories alone."""

import time
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bitgenome.cli.terminal import RUN_ARGUMENT, RUNS, AsJson, Storage, console, print_json
from bitgenome.observe.run_status import RunReader, RunStatus, runs_under

EVERY_S = 2.0
UNBOUNDED = 10_000  # columns


def status(
    run: Annotated[str | None, RUN_ARGUMENT] = None,
    storage: Storage = RUNS,
    watch: Annotated[bool, typer.Option("--watch", help="Again every 2 s, until the run ends")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a run is doing, or all of a storage path; reads their directories, needs no cluster."""
    from bitgenome.config.file import refuse_secrets  # noqa: PLC0415 - pydantic is slow to import
    from bitgenome.storage.run_names import run_location  # noqa: PLC0415

    refuse_secrets({"a run": run, "--storage": storage}, "bitgenome status")
    locations = runs_under(storage) if run is None else [run_location(run, storage)]
    readers = [RunReader(location) for location in locations]
    looks = looks_at(readers, watch)
    if as_json:
        for found in looks:
            for one in found:
                print_json(one)
    elif watch and console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for found in looks:
                live.update(view(found, single=run is not None), refresh=True)
    elif watch:
        show_lines(looks)
    else:
        console.print(view(next(looks), single=run is not None))


def looks_at(readers: list[RunReader], again: bool) -> Iterator[list[RunStatus]]:
    """Yield the state of all runs once, or with ``again`` every EVERY_S seconds until none is running."""
    while True:
        found = [reader.read() for reader in readers]
        yield found
        if not again or all(one.state != "running" for one in found):
            return
        time.sleep(EVERY_S)


def show_lines(looks: Iterator[list[RunStatus]]) -> None:
    """Print one line for each run whenever it has changed."""
    said: dict[str, str] = {}
    for found in looks:
        for one in found:
            line = f"{one.name}: {one.state}, {one.error or one.stage}, {progress_of(one)}, {best_of(one)}"
            if said.get(one.path) != line:
                typer.echo(line)
            said[one.path] = line


def view(found: list[RunStatus], single: bool) -> Group:
    """Return one run in detail, or all: as a table where it is as wide as the console, else a few lines a run."""
    if single:
        return details(found[0])
    table = table_of(found)
    damaged = (Text(one.error or "") for one in found if one.state == "damaged")
    if console.measure(table, options=console.options.update(width=UNBOUNDED)).maximum <= console.width:
        return Group(table, *damaged)
    lines = "{}\n  {}, {}\n  {}\n  {}"
    return Group(
        *(Text(lines.format(r.name, r.state, r.stage or "not begun", progress_of(r), best_of(r))) for r in found),
        *damaged,
    )


def table_of(found: list[RunStatus]) -> Table:
    """Return a table with one row per run."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("run", "state", "stage"):
        table.add_column(column, no_wrap=True)
    for column in ("gen", "evaluated", "KL", "bytes", "bits", "s"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in found:
        table.add_row(
            one.name, one.state, one.stage or "", str(one.generation), evaluations_of(one),
            number(one.best_kl, ".5f"), number(one.best_bytes, ","), number(one.bits_per_weight, ".3f"),
            f"{sum(one.seconds.values()):.0f}",
        )  # fmt: skip
    return table


def details(one: RunStatus) -> Group:
    """Return everything that is known of one run."""
    table = Table.grid(padding=(0, 2))
    rows = {
        "run": one.path,
        "state": one.state + (f": {one.error}" if one.error else ""),
        "stage": one.stage,
        "progress": progress_of(one),
        "best": best_of(one),
        "budget": one.budget_bytes and f"{one.budget_bytes:,} bytes",
        "seconds": ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in one.seconds.items()),
        "workers": one.workers and str(one.workers),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))
    return Group(table, Text(one.last_line or ""))


def progress_of(one: RunStatus) -> str:
    """Return generation, evaluations and time left as text."""
    left = f", about {duration(one.seconds_left)} left" if one.seconds_left is not None else ""
    return f"generation {one.generation}, {evaluations_of(one)} evaluations{left}"


def evaluations_of(one: RunStatus) -> str:
    """Return the number of evaluations as text, with the expected number if it is known."""
    return f"{one.evaluations} of {one.expected}" if one.expected else str(one.evaluations)


def best_of(one: RunStatus) -> str:
    """Return KL and size of the best genome as text, and its loss while the search goes by that."""
    if one.best_loss is None:
        return "nothing evaluated"
    loss = "" if one.state == "finished" else f"loss {one.best_loss:.6f}, "
    where = f" on {one.best_on} text" if one.best_on else ""
    healed = ", healed," if one.healed else ""
    found = f"{loss}KL {number(one.best_kl, '.6f')}{where}{healed} in {number(one.best_bytes, ',')} bytes"
    return found + (f" = {one.bits_per_weight:.4f} bits per weight" if one.bits_per_weight else "")


def number(value: float | None, form: str) -> str:
    """Return ``value`` in the format ``form``, or "" for None."""
    return "" if value is None else format(value, form)


def duration(seconds: float) -> str:
    """Return a duration in seconds as text in hours, minutes or seconds."""
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
