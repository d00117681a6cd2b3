"""Transfers of many files between a local directory and a remote folder: in parallel, and only what differs.

Files that say of others that they are there are sent last.
"""

import json
import logging
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bitgenome.common import layout
from bitgenome.common.files import atomic_write_json
from workers.storage.folders import Folder, file_sizes

log = logging.getLogger(__name__)

THREADS = 8
REPORT_S = 10.0  # seconds between the log lines of a long transfer


def local_sizes(root: Path, name: str) -> dict[str, int]:
    """Return the bytes of every file below ``root / name``, or of that file, by name relative to ``root``.

    Hidden files are left out.
    """
    return file_sizes(root, root / name)


def fetch(remote: Folder, root: Path, name: str) -> None:
    """Download the files below ``name`` that are missing in ``root``, or have another size there."""
    there, here = remote.sizes(name), local_sizes(root, name)
    _download(remote, root, {file: size for file, size in there.items() if here.get(file) != size})


def follow(remote: Folder, root: Path, name: str) -> None:
    """Make ``root`` a copy of the remote files below ``name``, which others may replace under the same names.

    Local files below ``name`` that are not remote are deleted.
    """
    there, here = remote.sizes(name), local_sizes(root, name)
    versions, record = remote.versions(name), root / f".{name.replace('/', '-')}.versions.json"
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    changed = {f: size for f, size in there.items() if here.get(f) != size or known.get(f) != versions[f]}
    _download(remote, root, changed)
    for file in here.keys() - there.keys():
        (root / file).unlink()
    if changed:
        atomic_write_json(record, versions)


def _download(remote: Folder, root: Path, sizes: Mapping[str, int]) -> None:
    """Download the files of ``sizes`` (bytes by name) into ``root``."""
    transfer(sizes, lambda name: remote.download(name, root / name), f"fetching from {remote.location}")


def send(remote: Folder, root: Path, names: Collection[str]) -> None:
    """Send the files ``names`` of ``root``; those that say of others that they are there (layout.POINTERS) go last."""
    sizes = {name: (root / name).stat().st_size for name in names}
    rank = {
        name: layout.POINTERS.index(Path(name).name) if Path(name).name in layout.POINTERS else -1 for name in names
    }
    transfer(
        {name: size for name, size in sizes.items() if rank[name] < 0},
        lambda name: remote.upload(root / name, name),
        f"sending to {remote.location}",
    )
    for name in sorted((name for name in names if rank[name] >= 0), key=lambda name: rank[name]):
        remote.upload(root / name, name)


def send_missing(remote: Folder, root: Path, name: str) -> None:
    """Send the files below ``root / name`` that are missing remotely, or have another size there."""
    there = remote.sizes(name)
    send(remote, root, [n for n, size in local_sizes(root, name).items() if there.get(n) != size])


def transfer(sizes: Mapping[str, int], move: Callable[[str], None], what: str) -> None:
    """Call ``move`` for the name of every file of ``sizes`` (bytes by name), in parallel.

    The progress of a long transfer is logged, with ``what`` it does.
    """
    started = told = time.monotonic()
    done, total = 0, sum(sizes.values())
    with ThreadPoolExecutor(THREADS) as threads:
        for name, _ in zip(sizes, threads.map(move, sizes), strict=True):
            done += sizes[name]
            if time.monotonic() - told > REPORT_S:
                told = time.monotonic()
                log.info("%s: %.1f of %.1f GB in %.0f s", what, done / 1e9, total / 1e9, told - started)
