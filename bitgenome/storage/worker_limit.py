"""workers.json: how many workers a running search may hold, told from outside while it runs.

A person writes ``{"most": 3}``; a batch adds its name, so that it can tell its own word from a person's.
"""

import logging
from pathlib import Path

from bitgenome.common import layout
from bitgenome.common.files import atomic_write_json, json_object

log = logging.getLogger(__name__)

SHOWN = 80  # characters of a file that says something else


class WorkerLimit:
    """The most workers that the run at ``run`` may hold now; None if nobody said, or nothing that can be read.

    Called again and again, it logs what the file says whenever that changes.
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
        except OSError:  # of storage that does not answer: what it said last
            return self._most
        if content != self._content:
            self._content, self._most = content, self._understood(content)
        return self._most

    def _understood(self, content: bytes | None) -> int | None:
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
    """Let the run at ``run`` hold at most ``most`` workers from now on; a ``batch`` leaves what a person wrote.

    Raises ValueError unless it is at least 1.
    """
    if most < 1:
        raise ValueError(f"expected at least 1 worker, found {most}")
    file = run / layout.WORKER_LIMIT
    if batch is None:
        atomic_write_json(file, {"most": most})
    elif not file.is_file() or "batch" in json_object(file.read_bytes()):
        atomic_write_json(file, {"most": most, "batch": batch})


def withdraw_limit(run: Path, batch: str) -> None:
    """Remove what ``batch`` wrote."""
    file = run / layout.WORKER_LIMIT
    if file.is_file() and json_object(file.read_bytes()).get("batch") == batch:
        file.unlink(missing_ok=True)
