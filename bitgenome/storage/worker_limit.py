"""Reads and writes workers.json, which limits the workers of a running search from outside.

A person writes ``{"most": 3}``; a batch adds its name, so that it can tell its own limit from a person's.
"""

import logging
from pathlib import Path

from bitgenome.common import layout
from bitgenome.common.files import atomic_write_json, json_object

log = logging.getLogger(__name__)

SHOWN = 80  # characters shown of a file that holds anything else


class WorkerLimit:
    """Returns, when called, the most workers that the run at ``run`` may hold; None without a readable limit.

    It is called repeatedly, and logs what the file says whenever that changes.
    """

    def __init__(self, run: Path):
        self._file = run / layout.WORKER_LIMIT
        self._content: bytes | None = None
        self._most: int | None = None

    def __call__(self) -> int | None:
        try:
            content = self._file.read_bytes()
        except FileNotFoundError:
            content = None
        except OSError:  # storage does not answer: the last limit holds
            return self._most
        if content != self._content:
            self._content, self._most = content, self._understood(content)
        return self._most

    def _understood(self, content: bytes | None) -> int | None:
        """Return the limit in a file's content, and log it."""
        if content is None:
            log.info("as many workers as there is work for: %s is gone", self._file)
            return None
        found = json_object(content)
        most = found.get("most")
        if not isinstance(most, int) or isinstance(most, bool):
            text = content.decode("utf-8", "replace")[:SHOWN]
            log.warning('expected {"most": a whole number of workers} in %s, found %r: no limit', self._file, text)
            return None
        by = f" of the batch {found['batch']}" if "batch" in found else ""
        log.info("at most %d workers, by %s%s", max(1, most), self._file, by)
        return max(1, most)


def write_limit(run: Path, most: int, batch: str | None = None) -> None:
    """Let the run at ``run`` hold at most ``most`` workers; a ``batch`` does not replace a person's limit.

    Raises ValueError unless ``most`` is at least 1.
    """
    if most < 1:
        raise ValueError(f"expected at least 1 worker, found {most}")
    file = run / layout.WORKER_LIMIT
    if batch is None:
        atomic_write_json(file, {"most": most})
    elif not file.is_file() or "batch" in json_object(file.read_bytes()):
        atomic_write_json(file, {"most": most, "batch": batch})


def withdraw_limit(run: Path, batch: str) -> None:
    """Remove the limit of the run at ``run`` if ``batch`` wrote it."""
    file = run / layout.WORKER_LIMIT
    if file.is_file() and json_object(file.read_bytes()).get("batch") == batch:
        file.unlink(missing_ok=True)
