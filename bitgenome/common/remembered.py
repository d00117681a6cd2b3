"""Remembers what was found in large files, so that a file is read once for as long as it does not change.

A file counts as unchanged while its size, its times of modification and of change, and its inode are the same. What
was found is kept in this user's cache folder, one JSON file for each group of files.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bitgenome.common import layout
from bitgenome.common.cpus import usable_cpus
from bitgenome.common.errors import StorageError
from bitgenome.common.files import atomic_write_json, json_object

log = logging.getLogger(__name__)

Found = dict[str, Any]

SCHEMA = 1  # raise when what is found in a file changes meaning
SETTLED_SECONDS = 2.0  # a file that changed later than this before it was read may change again with the same times
READERS = 4  # files that are read at the same time


def found_in(files: Sequence[Path], kind: str, group: Path, find: Callable[[Path], Found]) -> dict[Path, Found]:
    """Return what ``find`` finds in each file, a JSON object; files that have not changed since are not read again.

    ``kind`` names what is found, ``group`` the files together, such as their folder. A cache folder that cannot be
    read or written only costs the time of reading the files.
    """
    name = f"{kind}-{hashlib.sha256(str(group.resolve()).encode()).hexdigest()[:16]}.json"
    known, states = _read(name), {file: _state(file) for file in files}
    found = {file: known[str(file)]["found"] for file in files if known.get(str(file), {}).get("state") == states[file]}
    if unread := [file for file in files if file not in found]:
        started = time.time_ns()
        with ThreadPoolExecutor(min(len(unread), READERS, usable_cpus())) as readers:
            found.update(zip(unread, readers.map(find, unread), strict=True))
        settled = [
            file
            for file in files
            if max(states[file]["modified"], states[file]["changed"]) < started - SETTLED_SECONDS * 1e9
            and _state(file) == states[file]
        ]
        _write(name, {str(file): {"state": states[file], "found": found[file]} for file in settled})
    return found


def _memory(name: str) -> Path:
    return layout.cache_root() / layout.FOUND / name


def _read(name: str) -> dict[str, dict[str, Any]]:
    """Return what was remembered, by file; nothing if it cannot be read."""
    try:
        content = json_object(_memory(name).read_bytes())
    except (OSError, RuntimeError):  # RuntimeError: a user without a home folder
        return {}
    return {file: entry for file, entry in content.items() if isinstance(entry, dict) and "found" in entry}


def _state(file: Path) -> dict[str, int]:
    status = file.stat()
    return {
        "schema": SCHEMA,
        "size": status.st_size,
        "modified": status.st_mtime_ns,
        "changed": status.st_ctime_ns,
        "inode": status.st_ino,
    }


def _write(name: str, content: dict[str, Any]) -> None:
    try:
        memory = _memory(name)
        memory.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(memory, content, indent=None)
    except (OSError, RuntimeError, StorageError) as error:
        log.debug("what was found in files is not remembered: %s", error)
