"""Shows progress and time left: as a rich bar on a terminal, as an occasional plain line in a log."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

LINE_EVERY_S = 10.0
T = TypeVar("T")
Track = Callable[[Iterable[Any], int, str], Iterator[Any]]  # shows progress over an iterable


def track(items: Iterable[T], total: int, what: str, console: Console) -> Iterator[T]:
    """Yield ``items`` while showing how many of ``total`` are done and how long the rest will take.

    ``what`` names the work. Without a terminal a line is logged every LINE_EVERY_S seconds.
    """
    if console.is_terminal:
        yield from _bar(items, total, what, console)
        return
    started = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= LINE_EVERY_S or done == total:
            left = (now - started) / done * (total - done)
            log.info("%s: %d of %d, %.0f s, about %.0f s left", what, done, total, now - started, left)
            last = now


def tracker(console: Console) -> Track:
    """Return ``track`` for ``console``."""
    return partial(track, console=console)


def _bar(items: Iterable[T], total: int, what: str, console: Console) -> Iterator[T]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        for item in items:
            yield item
            progress.advance(task)
