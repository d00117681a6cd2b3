"""Formats the driver's logs: lines for people, or JSON objects for machines, both with run and generation.

A run's own events.log is always lines: people read it after something went wrong, and what machines need of a run is in
generations.jsonl and evaluations.jsonl.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

PACKAGES = ("bitgenome", "search", "evaluators", "exporters", "quantizers", "workers")
RUN: ContextVar[str | None] = ContextVar("run", default=None)  # name of the run that this process works for
GENERATION: ContextVar[int | None] = ContextVar("generation", default=None)  # being evaluated, from 1


class LineFormatter(logging.Formatter):
    """Formats each record as one line, with run and generation while there is a generation."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(position)s%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        generation = GENERATION.get()
        record.__dict__["position"] = f"[{RUN.get()} g{generation}] " if generation else ""
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """Formats each record as one JSON object, with the keys of Ray's own JSON worker logs, run and generation."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "asctime": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "levelname": record.levelname,
            "name": record.name,
            "message": record.getMessage(),
            "run": RUN.get(),
            "generation": GENERATION.get(),
        }
        if record.exc_info:
            fields["exc_text"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def start_logging(console: Console, as_json: bool = False, level: int = logging.INFO) -> None:
    """Log to ``console`` from ``level`` on: JSON if asked for, else rich lines on a terminal, or plain lines.

    What our own packages log below that level still goes into the events.log of a run.
    """
    handler: logging.Handler
    if not as_json and console.is_terminal:
        handler = RichHandler(console=console, show_level=False, show_path=False)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(JsonFormatter() if as_json else logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.setLevel(level)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.DEBUG)


def show_from(level: int) -> None:
    """Show what is logged from ``level`` on; a run's events.log has everything all the same."""
    for handler in shown():
        handler.setLevel(level)


def shows(level: int) -> bool:
    """Return whether what is logged at ``level`` is shown."""
    return any(handler.level <= level for handler in shown()) or not shown()


def shown() -> list[logging.Handler]:
    """Return the handlers that show what is logged, of which events.log is none."""
    return [handler for handler in logging.getLogger().handlers if not isinstance(handler, logging.FileHandler)]


@contextmanager
def log_file(path: Path, run: str) -> Iterator[None]:
    """Write everything that is logged to ``path`` as lines, marked with ``run``, while the context lasts."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(LineFormatter())
    logging.getLogger().addHandler(handler)
    token = RUN.set(run)
    try:
        yield
    finally:
        RUN.reset(token)
        logging.getLogger().removeHandler(handler)
        handler.close()
