"""Finds the shared artefacts that no run needs, and removes them.

Every run lists in shared.txt what it uses. A run needs all of that while it can be continued; a finished one needs the
bank, the scaled model and the model that was stored or opened, which ``export`` and ``verify`` read.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bitgenome.common import layout
from bitgenome.common.errors import UserError
from bitgenome.common.files import json_object
from bitgenome.storage.lease import Lease, LeaseHeldError, is_owned
from workers.storage.folders import Folder, is_url, mirror_root, open_folder

log = logging.getLogger(__name__)

# by export and verify
READ_AGAIN = (layout.BANK_KIND, layout.SCALING_KIND, layout.MODEL_KIND, layout.OPENED_KIND, layout.TEMPLATE_KIND)
DIGEST_DIGITS = 16  # of the name of an artefact's directory


@dataclass(frozen=True)
class Use:
    """Says which artefacts a run uses, as ``kind/digest``, and whether it is finished and nobody works on it."""

    names: frozenset[str]
    finished: bool
    alive: bool

    def needs(self, name: str, keep_for_resume: bool) -> bool:
        """Return whether the run needs the artefact ``name``, or with ``keep_for_resume`` has used it at all."""
        if name == layout.STAGED:  # files on their way to other machines
            return self.alive
        if name not in self.names:
            return False
        return keep_for_resume or self.alive or not self.finished or name.partition("/")[0] in READ_AGAIN


@dataclass(frozen=True)
class Artefact:
    """Describes a shared artefact: its name ``kind/digest``, bytes, time of writing (epoch seconds) and runs."""

    name: str
    size: int
    written: float | None
    runs: tuple[str, ...]  # that need it


def artefacts(storage: str, keep_for_resume: bool = True) -> list[Artefact]:
    """Return the shared artefacts at a storage path or URL, the largest first, with the runs that need each.

    With ``keep_for_resume`` a finished run needs all that it has used. Raises UserError if the path is no directory,
    and StorageError.
    """
    if not is_url(storage) and not Path(storage).is_dir():
        raise UserError(f"expected a storage path with runs, found no folder at {storage}")
    uses = uses_under(storage)
    found = [
        Artefact(name, size, written, tuple(run for run, use in uses.items() if use.needs(name, keep_for_resume)))
        for name, size, written in _found(storage)
    ]
    return sorted(found, key=lambda artefact: (-artefact.size, artefact.name))


def uses_under(storage: str) -> dict[str, Use]:
    """Return what the runs and studies at a storage path or URL use, by name."""
    folder = open_folder(storage)
    parts = [PurePosixPath(name).parts for name in folder.sizes() if name.count("/") == 1]
    marks = (layout.USED, layout.RECORD, layout.STUDY)
    names = sorted({run for run, file in parts if file in marks and run != layout.SHARED})
    return {name: _use(folder, name, f"{storage.rstrip('/')}/{name}") for name in names}


def _use(folder: Folder, run: str, location: str) -> Use:
    record = json_object(folder.read(f"{run}/{layout.RECORD}") or b"{}")
    used = (folder.read(f"{run}/{layout.USED}") or b"").decode("utf-8", "replace").split()
    for key, kind, depth in (("bank", layout.BANK_KIND, 1), ("scaled_model", layout.SCALING_KIND, 2)):
        if isinstance(path := record.get(key), str):  # also of runs from before there was a list
            used.append(f"{kind}/{PurePosixPath(path).parts[-depth]}")
    digests = record.get("digests")
    if isinstance(digests, dict) and isinstance(model := digests.get("model"), str):
        used.append(f"{layout.MODEL_KIND}/{model[:DIGEST_DIGITS]}")
    return Use(frozenset(used), record.get("ended") == "finished", is_owned(location))


def _found(storage: str) -> Iterator[tuple[str, int, float | None]]:
    """Yield name, bytes and time of writing of everything that may be removed; empty directories are left out."""
    if not is_url(storage):
        for directory in sorted((Path(storage) / layout.SHARED).glob("*/*")):
            files = [f for f in directory.rglob("*") if f.is_file() and layout.LEASE not in f.parts]
            if directory.is_dir() and files:
                status = [file.stat() for file in files]
                name = f"{directory.parent.name}/{directory.name}"
                yield name, sum(s.st_size for s in status), max(s.st_mtime for s in status)
        return
    folder = open_folder(storage)
    sizes: dict[str, dict[str, int]] = {}
    for name, size in folder.sizes(layout.SHARED).items():
        sizes.setdefault("/".join(name.split("/")[1:3]), {})[name] = size
    for artefact, files_of in sizes.items():
        yield artefact, sum(files_of.values()), folder.modified(_last(files_of))
    staged = open_folder(f"{storage.rstrip('/')}/{layout.STAGED}")
    if left := staged.sizes():
        yield layout.STAGED, sum(left.values()), staged.modified(next(iter(left)))


def _last(files: Mapping[str, int]) -> str:
    """Return the file that was written last as far as names tell: one that says of others that they are there."""
    return next((name for name in files if name.rpartition("/")[2] in layout.POINTERS), next(iter(files)))


def remove(storage: str, artefact: Artefact, keep_for_resume: bool = True) -> bool:
    """Remove an artefact that no run needs; return False if one needs it by now, or somebody builds it.

    Behind a URL this machine's copy goes too.
    """
    if artefact.name == layout.STAGED:
        if any(use.alive for use in uses_under(storage).values()):
            return False
        _remove_remote(open_folder(f"{storage.rstrip('/')}/{layout.STAGED}"), "")
        return True
    name = f"{layout.SHARED}/{artefact.name}"
    try:
        with Lease(f"{storage.rstrip('/')}/{name}", f"{artefact.name} in {storage}"):
            if any(use.needs(artefact.name, keep_for_resume) for use in uses_under(storage).values()):
                return False
            if is_url(storage):
                _remove_remote(open_folder(storage), name)
            _remove_local((mirror_root(storage) if is_url(storage) else Path(storage)) / name)
    except LeaseHeldError:
        return False
    return True


def _remove_remote(folder: Folder, name: str) -> None:
    for file in sorted(folder.sizes(name), key=_after_pointers):
        folder.delete(file)


def _remove_local(directory: Path) -> None:
    """Remove all of a directory but its lease, which somebody may be waiting for."""
    for entry in sorted(directory.glob("*"), key=lambda path: _after_pointers(path.name)):
        if entry.name == layout.LEASE:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def _after_pointers(name: str) -> bool:
    """Sort files that say of others that they are there first: what is left of an artefact does not look complete."""
    return name.rpartition("/")[2] not in layout.POINTERS
