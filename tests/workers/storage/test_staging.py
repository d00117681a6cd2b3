"""Tasks find their files on every node, and what they make comes back."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bitgenome.common import layout
from bitgenome.common.errors import StorageError
from bitgenome.storage.staged import local_model
from evaluators.prepare.bank import Bank, BuildBankGroup
from evaluators.prepare.input_group import group_file
from quantizers.settings import CompensationSettings
from tests.conftest import SmallBank
from workers.pool.base import SerialPool, Task
from workers.storage.folders import mirror_root
from workers.storage.staging import StagedPool, StagedTask, StorageRoot, paths_of, stage, staged_name


class OtherNode(SerialPool):
    """Runs its tasks with another node's disk."""

    def __init__(self, cache: Path, patch: pytest.MonkeyPatch):
        super().__init__()
        self.cache, self.patch = cache, patch
        self.seen: list[Task] = []

    def _run(self, task: Task) -> Any:
        stage.cache_clear()  # as another process
        with self.patch.context() as there:
            there.setenv("BITGENOME_CACHE", str(self.cache))
            self.seen.append(task)
            return super()._run(task)


@dataclass(frozen=True)
class Copy:
    """Copy a file into a folder, and tell where the file was found."""

    source: Path
    directory: Path
    label: str = "copy"

    @property
    def makes(self) -> tuple[Path, ...]:
        return (self.directory,)

    def run(self, state: dict[Any, Any]) -> str:
        (self.directory / "copy").write_bytes(self.source.read_bytes())
        return str(self.source)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OtherNode:
    monkeypatch.setenv("BITGENOME_CACHE", str(tmp_path / "here"))
    return OtherNode(tmp_path / "there", monkeypatch)


@pytest.fixture
def root(tmp_path: Path, node: OtherNode) -> StorageRoot:
    url = (tmp_path / "nfs").as_uri()
    return StorageRoot(mirror_root(url), url)


def test_a_task_reads_and_writes_on_its_own_node_and_the_driver_gets_the_files(
    tmp_path: Path, node: OtherNode, root: StorageRoot
) -> None:
    made = root.local / "shared" / "kind" / "digest"
    made.mkdir(parents=True)
    (root.local / "run").mkdir()
    source = root.local / "run" / "windows"
    for content in ("first", "other"):  # under one name, of one size
        source.write_text(content)
        (read,) = StagedPool(node, [root]).map([Copy(source, made)])
        assert Path(read).is_relative_to(tmp_path / "there") and Path(read).read_text() == content
    assert (made / "copy").exists() and (tmp_path / "nfs" / "shared" / "kind" / "digest" / "copy").exists()
    assert node.seen[0].label == "copy"


def test_a_bank_is_built_from_staged_files_elsewhere_to_the_same_bytes(
    small_bank: SmallBank, tmp_path: Path, node: OtherNode, root: StorageRoot
) -> None:
    group = small_bank.groups[0]
    local, bank = (root.local / "shared" / kind / "digest" for kind in ("calibration", "bank"))
    for folder in (local, bank):
        folder.mkdir(parents=True)
    group_file(local, group).write_bytes(group_file(small_bank.directory, group).read_bytes())
    model = StorageRoot(small_bank.folder.path.parent, f"{root.url}/shared/model/digest")
    formats = {gene.name: tuple(f.name for f in gene.formats) for gene in small_bank.space.genes}
    task = BuildBankGroup(small_bank.folder.path, group_file(local, group), bank, formats, CompensationSettings())
    (built,) = StagedPool(node, [root, model]).map([task])
    formats_of = {gene.name: gene.formats for gene in small_bank.space.genes}
    for tensor in built:
        for fmt in formats_of[tensor]:
            assert Bank(bank).packed(tensor, fmt).equal(Bank(small_bank.directory).packed(tensor, fmt))
    staged = [path.relative_to(tmp_path / "there") for path in (tmp_path / "there").rglob("model.safetensors")]
    assert len(staged) == 1


def test_a_node_fetches_a_folder_over_the_network_once(tmp_path: Path, node: OtherNode, root: StorageRoot) -> None:
    remote = tmp_path / "nfs" / "shared" / "bank"
    remote.mkdir(parents=True)
    (remote / "tensor").write_text("weights")
    stage(root.url, tmp_path / "disk", "shared/bank", None)
    staged = (tmp_path / "disk" / "shared" / "bank" / "tensor").stat().st_ino
    stage.cache_clear()  # another process of the node
    stage(root.url, tmp_path / "disk", "shared/bank", None)
    assert (tmp_path / "disk" / "shared" / "bank" / "tensor").stat().st_ino == staged


def test_a_file_that_is_not_the_drivers_is_refused(tmp_path: Path, node: OtherNode, root: StorageRoot) -> None:
    staged = tmp_path / "nfs" / staged_name("windows", "0" * 64)
    staged.parent.mkdir(parents=True)
    staged.write_text("of another run")
    with pytest.raises(StorageError, match="found other content"):
        stage(root.url, tmp_path / "disk", "windows", "0" * 64)


@dataclass(frozen=True)
class Advance:
    """Add a letter to a file, in place."""

    file: Path
    label: str = "advance"

    @property
    def makes(self) -> tuple[Path, ...]:
        return (self.file,)

    def run(self, state: dict[Any, Any]) -> str:
        self.file.write_text(self.file.read_text() + "x")
        return self.file.read_text()


def test_a_task_that_runs_again_reads_what_it_read_although_it_has_rewritten_it(
    node: OtherNode, root: StorageRoot
) -> None:
    (root.local / "run").mkdir(parents=True)
    file = root.local / "run" / "checkpoint"
    file.write_text("a")
    pool = StagedPool(node, [root])
    task = Advance(file)
    assert list(pool.map([task])) == ["ax"]
    (again,) = node.seen
    answer = node._run(again)  # as after the loss of a worker that had sent what it made
    assert answer.result == "ax"
    assert list(pool.map([task])) == ["axx"] and file.read_text() == "axx"
    pool.close()
    assert not list((Path(root.url.removeprefix("file://")) / layout.STAGED).iterdir())


def test_a_model_that_was_uploaded_again_is_fetched_again_although_its_sizes_are_the_same(
    tmp_path: Path, node: OtherNode
) -> None:
    remote = tmp_path / "nfs" / "models" / "llama"
    remote.mkdir(parents=True)
    url = remote.as_uri()
    for weights in ("first", "other"):
        stage.cache_clear()  # another run
        (remote / "model.safetensors").write_text(weights)
        assert (local_model(url) / "model.safetensors").read_text() == weights
    (remote / "model.safetensors").rename(remote / "model-00001-of-00001.safetensors")
    stage.cache_clear()
    assert [file.name for file in local_model(url).iterdir()] == ["model-00001-of-00001.safetensors"]
    fetched = (local_model(url) / "model-00001-of-00001.safetensors").stat().st_ino
    stage.cache_clear()
    assert (local_model(url) / "model-00001-of-00001.safetensors").stat().st_ino == fetched


def test_paths_are_found_in_setups_within_tasks(small_bank: SmallBank) -> None:
    task = small_bank.bank_tasks(Path("bank"))[0]
    assert set(paths_of(task)) == {task.model, task.group, task.directory}
    assert set(paths_of(small_bank.setup())) == {
        small_bank.folder.path,
        small_bank.directory,
        small_bank.windows_file,
    }


def test_a_file_outside_all_roots_is_left_where_it_is(tmp_path: Path, node: OtherNode, root: StorageRoot) -> None:
    source = tmp_path / "elsewhere"
    source.write_text("content")
    made = root.local / "shared" / "kind"
    made.mkdir(parents=True)
    (read,) = StagedPool(node, [root]).map([Copy(source, made)])
    assert read == str(source)
    assert isinstance(node.seen[0], StagedTask) and os.environ["BITGENOME_CACHE"] == str(tmp_path / "here")
