"""How the driver logs: lines for people, or a JSON object a line for machines, both with run and generation.

A run's own events.log is always lines, read by people after something went wrong: what machines read of a run lies in
generations.jsonl and evaluations.jsonl already.
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

RUN: ContextVar[str | None] = ContextVar("run", default=None)  # that this process works for
GENERATION: ContextVar[int | None] = ContextVar("generation", default=None)  # that is being evaluated, from 1


class LineFormatter(logging.Formatter):
    """One line a record, with the run and the generation where there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(position)s%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        generation = GENERATION.get()
        record.__dict__["position"] = f"[{RUN.get()} g{generation}] " if generation else ""
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a record, with the keys that Ray's own JSON logs of workers have, and run and generation."""

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


def log_handler(console: Console, as_json: bool) -> logging.Handler:
    """JSON where it is asked for; else rich lines on a terminal, and plain ones with the time elsewhere."""
    if not as_json and console.is_terminal:
        return RichHandler(console=console, show_level=False, show_path=False)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    return handler


@contextmanager
def log_file(path: Path, run: str) -> Iterator[None]:
    """While open, everything that is logged is of ``run``, and also goes to ``path``, as lines."""
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
