"""Fixtures of all tests: the embedded model, one bank of it for all test processes, and a disk that is soon full."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from evaluators.data.documents import stdlib_documents
from evaluators.data.stdlib import load_held_out
from evaluators.data.tokenizer import load_tokenizer
from evaluators.data.windows import TokenWindows, token_windows
from evaluators.engine.evaluator import EvaluatorSetup
from evaluators.model.folder import ModelFolder
from evaluators.prepare.bank import BuildBankGroup
from evaluators.prepare.calibration import Calibrate
from evaluators.prepare.input_group import group_file
from exporters.files.gguf_writer import fixed_bytes
from exporters.metadata.tensor_names import quantizable_tensors
from quantizers.settings import CompensationSettings
from search.fitness import FitnessSettings
from search.types import SearchSpace
from workers.pool.base import SerialPool

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and tests send it
REPOSITORY = Path(__file__).parents[1]
EMBEDDED = REPOSITORY / "models" / "stdlib-6m"
LEVELS = ("W2", "W3", "W4", "W8")
TOKENS = {"calibration": 4096, "search": 1536, "validation": 1024, "test": 2048}


@dataclass(frozen=True)
class SmallBank:
    """The embedded model with a bank from little calibration text."""

    folder: ModelFolder
    directory: Path
    windows_file: Path
    windows: TokenWindows
    groups: list[str]
    space: SearchSpace

    def setup(self, **fitness: Any) -> EvaluatorSetup:
        settings = FitnessSettings(**fitness)
        key = f"{self.directory}{settings}"
        return EvaluatorSetup(self.folder.path, self.directory, self.windows_file, self.space, settings, key)

    def bank_tasks(self, directory: Path) -> list[BuildBankGroup]:
        formats = {gene.name: tuple(f.name for f in gene.formats) for gene in self.space.genes}
        return [
            BuildBankGroup(
                self.folder.path, group_file(self.directory, group), directory, formats, CompensationSettings()
            )
            for group in self.groups
        ]


def built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """Return a directory that the first test process builds and the others wait for; to change it, take a copy."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    directory, done = root / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            build(directory)
            done.touch()
    return directory


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What was found in model files is remembered apart from the user's own cache."""
    os.environ.setdefault("BITGENOME_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def small_bank(tmp_path_factory: pytest.TempPathFactory) -> SmallBank:
    """The bank of little text; no test changes it."""
    folder = ModelFolder(EMBEDDED)
    space = SearchSpace.per_tensor(quantizable_tensors(folder), LEVELS, fixed_bytes(folder))
    documents = stdlib_documents(load_held_out(EMBEDDED / "splits.json"))
    windows = token_windows(load_tokenizer(folder.path), documents, 256, TOKENS, seed=0)

    def small(directory: Path) -> SmallBank:
        groups = json.loads((directory / "groups.json").read_text())
        return SmallBank(folder, directory, directory / "windows.safetensors", windows, groups, space)

    def build(directory: Path) -> None:
        windows_file, pool = directory / "windows.safetensors", SerialPool()
        windows_file.write_bytes(windows.to_bytes())
        (groups,) = pool.map([Calibrate(EMBEDDED, windows_file, directory)])
        (directory / "groups.json").write_text(json.dumps(list(groups)))
        list(pool.map(small(directory).bank_tasks(directory)))

    return small(built_once(tmp_path_factory, "small-bank", build))


def let_ray_read_environment() -> None:
    """Make Ray in this process read tokens and settings again; it keeps those of the first cluster that it meets."""
    if ray := sys.modules.get("ray"):
        ray._raylet.Config.initialize("")


def no_progress(items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
    """Stands where the command line shows a progress bar."""
    return iter(items)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def free_ports(count: int) -> list[int]:
    """Outside 10002-19999, which Ray gives to its workers."""
    ports: list[int] = []
    while len(ports) < count:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        if port >= 20000 and port not in ports:
            ports.append(port)
    return ports
