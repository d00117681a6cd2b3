"""Folders of whole files, in a directory or behind an fsspec URL: the storage that leases, mirrors and staging use.

A file appears whole or not at all. Names are relative, with "/".
"""

import hashlib
import os
import shutil
import stat
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from bitgenome.common.errors import StorageError
from bitgenome.common.files import atomic_write_bytes, replacing, sync_folder
from bitgenome.common.layout import cache_root

REMEDIES = {"s3": "pip install 'bitgenome[s3]'"}  # for protocols whose package is missing


def file_sizes(root: Path, location: Path) -> dict[str, int]:
    """Return the bytes of every file at or below ``location``, by name relative to ``root``, except hidden files."""
    found = {}
    for file in (location, *location.rglob("*")):
        name = file.relative_to(root).as_posix()
        with suppress(FileNotFoundError):  # removed meanwhile
            if shown(name) and stat.S_ISREG((status := file.stat()).st_mode):
                found[name] = status.st_size
    return found


def shown(name: str) -> bool:
    """Return whether no part of a file's name is hidden or empty ("a//b" would be an absolute path below "a")."""
    return name == "." or all(part and not part.startswith(".") for part in name.split("/"))


def is_url(location: str | Path) -> bool:
    """Return whether ``location`` is a URL rather than a path."""
    return "://" in str(location)


VERSION_KEYS = ("size", "ETag", "etag", "LastModified", "last_modified", "mtime", "updated", "md5Hash")  # of backends


class Folder(ABC):
    """A folder reads and writes whole files below one location, which need not exist before the first write.

    Every method raises StorageError if the storage fails.
    """

    location: str

    @abstractmethod
    def sizes(self, name: str = "") -> dict[str, int]:
        """Return the bytes of every file below ``name``, or of the file ``name`` itself; empty if there is nothing.

        Hidden files, such as locks and leases, are left out.
        """

    @abstractmethod
    def versions(self, name: str) -> dict[str, str]:
        """Return, for the same files as ``sizes``, a string that changes with the content even if the size does not."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None if there is no such file."""

    @abstractmethod
    def modified(self, name: str) -> float | None:
        """Return when a file was last written, in seconds since the epoch; None if there is no such file."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Create or replace a file."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Create a file unless it exists; of any number of callers at the same time, one gets True."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file if it exists."""

    @abstractmethod
    def upload(self, source: Path, name: str) -> None:
        """Create or replace a file with the content of ``source``."""

    @abstractmethod
    def download(self, name: str, target: Path) -> None:
        """Create or replace ``target`` with the content of a file."""


def open_folder(location: str | Path) -> Folder:
    """Return the folder at a path or URL. Raises StorageError for a URL that no installed package can serve."""
    if str(location).startswith("file://"):
        return LocalFolder(Path(str(location).removeprefix("file://")))
    return ObjectFolder(str(location)) if is_url(location) else LocalFolder(Path(location))


class LocalFolder(Folder):
    """Keeps files in a directory, which may be on a network file system."""

    def __init__(self, path: Path):
        self.path, self.location = path, str(path)

    @contextmanager
    def _using(self, action: str, name: str) -> Iterator[Path]:
        """Yield the path of ``name``; if the system refuses it, raise a StorageError that names the path."""
        path = self.path / name
        try:
            yield path
        except OSError as error:
            raise StorageError(f"expected to {action} {path}, found: {error.strerror or error}") from None

    def sizes(self, name: str = "") -> dict[str, int]:
        with self._using("list", name) as path:
            return file_sizes(self.path, path)

    def versions(self, name: str) -> dict[str, str]:
        with self._using("list", name):
            return {file: f"{(self.path / file).stat().st_mtime_ns}" for file in self.sizes(name)}

    def read(self, name: str) -> bytes | None:
        with self._using("read", name) as path:
            return path.read_bytes() if path.is_file() else None

    def modified(self, name: str) -> float | None:
        with self._using("look at", name) as path:
            return path.stat().st_mtime if path.is_file() else None

    def write(self, name: str, data: bytes) -> None:
        with self._using("write", name) as path:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(path, data)

    def create(self, name: str, data: bytes) -> bool:
        with self._using("write", name) as path:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
            try:
                with os.fdopen(descriptor, "wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                link_or_copy(Path(temporary), path)
            except FileExistsError:
                return False
            finally:
                Path(temporary).unlink(missing_ok=True)
            sync_folder(path.parent)
        return True

    def delete(self, name: str) -> None:
        with self._using("delete", name) as path:
            path.unlink(missing_ok=True)

    def upload(self, source: Path, name: str) -> None:
        with self._using("write", name) as path:
            copy_whole(source, path)

    def download(self, name: str, target: Path) -> None:
        with self._using("read", name) as path:
            copy_whole(path, target)


class ObjectFolder(Folder):
    """Keeps files behind an fsspec URL, s3:// above all.

    Every backend raises errors of its own library; all of them become StorageError.
    """

    def __init__(self, url: str):
        import fsspec  # noqa: PLC0415 - with its backends only where a URL is used

        self.location = url.rstrip("/")
        protocol = url.partition("://")[0]
        try:
            self._system, self._root = fsspec.core.url_to_fs(self.location, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            remedy = REMEDIES.get(protocol, "install the fsspec package of that protocol")
            raise StorageError(f"expected storage that fsspec can reach at {url}, found: {error} ({remedy})") from None

    @contextmanager
    def _using(self, action: str, name: str) -> Iterator[str]:
        """Yield the path of ``name`` in the backend; turn whatever the backend raises into a StorageError."""
        path = f"{self._root}/{name}".rstrip("/")
        try:
            yield path
        except FileNotFoundError:
            raise StorageError(
                f"expected to {action} {self.location}/{name}, found no such file, or no such bucket"
            ) from None
        except Exception as error:  # backends share no base class
            reason = " ".join(f"{error}".split()) or type(error).__name__
            raise StorageError(f"expected to {action} {self.location}/{name}, found: {reason}") from None

    def _listed(self, name: str) -> dict[str, dict[str, Any]]:
        """Return the backend's details of every file below ``name``, by name."""
        with self._using("list", name) as path:
            found: dict[str, dict[str, Any]] = self._system.find(path, detail=True)
        return {name: info for key, info in found.items() if shown(name := key[len(self._root) + 1 :])}

    def sizes(self, name: str = "") -> dict[str, int]:
        return {name: int(info["size"]) for name, info in self._listed(name).items()}

    def versions(self, name: str) -> dict[str, str]:
        return {
            name: " ".join(f"{info.get(key, '')}" for key in VERSION_KEYS) for name, info in self._listed(name).items()
        }

    def read(self, name: str) -> bytes | None:
        with self._using("read", name) as path:
            try:
                data: bytes = self._system.cat_file(path)
            except FileNotFoundError:
                return None
        return data

    def modified(self, name: str) -> float | None:
        with self._using("look at", name) as path:
            try:
                when: datetime = self._system.modified(path)
            except FileNotFoundError:
                return None
        return when.timestamp()

    def write(self, name: str, data: bytes) -> None:
        with self._using("write", name) as path:
            self._system.pipe_file(path, data)

    def create(self, name: str, data: bytes) -> bool:
        with self._using("write", name) as path:
            try:
                self._system.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
        return self.read(name) == data  # a backend without exclusive creation keeps the last writer's

    def delete(self, name: str) -> None:
        with self._using("delete", name) as path:
            if self._system.exists(path):
                self._system.rm_file(path)

    def upload(self, source: Path, name: str) -> None:
        with self._using("write", name) as path:
            self._system.put_file(str(source), path)

    def download(self, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary, self._using("read", name) as path:
            self._system.get_file(path, str(temporary))


def copy_whole(source: Path, target: Path) -> None:
    """Copy ``source`` so that ``target`` has the old content or the new one, never half of either."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def link_or_copy(source: Path, target: Path) -> None:
    """Create ``target`` from ``source`` at once and whole, by a hard link, over NFS too.

    A mount without links gets an exclusive copy. Raises FileExistsError if ``target`` exists.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        with target.open("xb") as stream:
            stream.write(source.read_bytes())


def mirror_root(url: str) -> Path:
    """Return the directory where this machine keeps its copy of the files at ``url``."""
    return cache_root() / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
