"""Defines ``bitgenome prune``, which frees the disk space of shared artefacts that no run needs."""

import sys
import time
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from bitgenome.cli.terminal import RUNS, Storage, console
from bitgenome.common.errors import UserError

SHOWN_RUNS = 3


def prune(
    storage: Storage = RUNS,
    finished: Annotated[
        bool, typer.Option("--finished", help="Also what finished runs need only to be resumed, such as Hessians")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed, and remove nothing")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask")] = False,
) -> None:
    """Show shared artefacts by size and age, with the runs that need them, and remove those that no run needs."""
    from bitgenome.config.file import refuse_secrets  # noqa: PLC0415 - pydantic is slow to import
    from bitgenome.storage.prune import artefacts, remove  # noqa: PLC0415

    refuse_secrets({"--storage": storage}, "bitgenome prune")
    found = artefacts(storage, not finished)
    free = [artefact for artefact in found if not artefact.runs]
    table = Table(box=SIMPLE_HEAD)
    for column in ("artefact", "size", "written", "needed by"):
        table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    for one in sorted(found, key=lambda artefact: bool(artefact.runs)):
        more = f" and {len(one.runs) - SHOWN_RUNS} more" if len(one.runs) > SHOWN_RUNS else ""
        needed = ", ".join(one.runs[:SHOWN_RUNS]) + more if one.runs else "none"
        table.add_row(one.name, size_text(one.size), age_text(one.written), needed, style="" if one.runs else "bold")
    if found:
        console.print(table)
    total = size_text(sum(artefact.size for artefact in free))
    if not free:
        console.print(f"nothing to remove in {storage}", soft_wrap=True)
        return
    if dry_run:
        console.print(f"would remove {len(free)} of {len(found)} artefacts, {total}", soft_wrap=True)
        return
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("expected --yes or --dry-run where nobody can be asked, found neither")
        typer.confirm(f"Remove {len(free)} of {len(found)} artefacts, {total}?", abort=True)
    removed = [artefact for artefact in free if remove(storage, artefact, not finished)]
    console.print(f"removed {len(removed)} artefacts, {size_text(sum(a.size for a in removed))}", soft_wrap=True)
    for artefact in free:
        if artefact not in removed:
            console.print(f"kept {artefact.name}: somebody uses it by now", soft_wrap=True)


def size_text(size: int) -> str:
    """Return bytes as text, in MiB or GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def age_text(written: float | None) -> str:
    """Return how long ago something was written (epoch seconds), in the unit that suits it."""
    if written is None:
        return "unknown"
    seconds = max(0.0, time.time() - written)
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"
