"""Many files between a folder of this machine and a remote one: in parallel, only what differs, the last ones last."""

import logging
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from workers.remote import Folder, file_sizes

log = logging.getLogger(__name__)

THREADS = 8
REPORT_S = 10.0  # between the lines of a long transfer
POINTERS = (  # files that say of others that they are there: sent behind them
    "manifest.json",
    "groups.json",
    "scaled_view.json",
    "sensitivity.parquet",
    "run.json",
    "checkpoint.json",
)


def local_sizes(root: Path, name: str) -> dict[str, int]:
    """Bytes of every file below ``root / name``, or of that file, by name under ``root``; hidden ones left out."""
    return file_sizes(root, root / name)


def fetch(remote: Folder, root: Path, sizes: Mapping[str, int]) -> None:
    """Bring the files of these sizes that are not in ``root``, or of another size there."""
    missing = {n: size for n, size in sizes.items() if not (f := root / n).is_file() or f.stat().st_size != size}
    transfer(missing, lambda name: remote.download(name, root / name), f"fetching from {remote.place}")


def send(remote: Folder, root: Path, names: Collection[str]) -> None:
    """Send files of ``root``; POINTERS go last, in their order."""
    sizes = {name: (root / name).stat().st_size for name in names}
    rank = {name: POINTERS.index(Path(name).name) if Path(name).name in POINTERS else -1 for name in names}
    transfer(
        {name: size for name, size in sizes.items() if rank[name] < 0},
        lambda name: remote.upload(root / name, name),
        f"sending to {remote.place}",
    )
    for name in sorted((name for name in names if rank[name] >= 0), key=lambda name: rank[name]):
        remote.upload(root / name, name)


def send_missing(remote: Folder, root: Path, name: str) -> None:
    """Send the files below ``root / name`` that are not there remotely, or of another size."""
    there = remote.sizes(name)
    send(remote, root, [n for n, size in local_sizes(root, name).items() if there.get(n) != size])


def transfer(sizes: Mapping[str, int], move: Callable[[str], None], what: str) -> None:
    """``move`` every file; a line in the log now and then where it takes long."""
    started = told = time.monotonic()
    done, total = 0, sum(sizes.values())
    with ThreadPoolExecutor(THREADS) as threads:
        for name, _ in zip(sizes, threads.map(move, sizes), strict=True):
            done += sizes[name]
            if time.monotonic() - told > REPORT_S:
                told = time.monotonic()
                log.info("%s: %.1f of %.1f GB in %.0f s", what, done / 1e9, total / 1e9, told - started)
