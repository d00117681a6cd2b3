"""A large file is read once for as long as it does not change."""

import os
from pathlib import Path

import pytest

from bitgenome.common import layout, remembered
from bitgenome.common.remembered import Found, found_in


class Reader:
    """Finds the text of a file, and counts how often it reads."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, file: Path) -> Found:
        self.read.append(file.name)
        return {"text": file.read_text()}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("BITGENOME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "SETTLED_SECONDS", -1.0)
    return tmp_path / "cache"


def files_of(folder: Path) -> list[Path]:
    files = [folder / "a", folder / "b"]
    for file in files:
        file.write_text("old")
    return files


def test_only_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    files, reader = files_of(tmp_path), Reader()
    expected = {file: {"text": "old"} for file in files}
    assert [found_in(files, "text", tmp_path, reader) for _ in range(3)] == [expected] * 3
    assert sorted(reader.read) == ["a", "b"]
    status = files[0].stat()
    files[0].write_text("new")
    os.utime(files[0], ns=(status.st_atime_ns, status.st_mtime_ns))  # as a copy that keeps times: same size and time
    assert found_in(files, "text", tmp_path, reader) == expected | {files[0]: {"text": "new"}}
    assert sorted(reader.read) == ["a", "a", "b"]
    found_in(files, "other", tmp_path, reader)
    assert len(reader.read) == 5, "another kind of finding is not this one"


def test_a_file_that_changed_just_now_is_not_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remembered, "SETTLED_SECONDS", 60.0)
    files, reader = files_of(tmp_path), Reader()
    for _ in range(2):
        found_in(files, "text", tmp_path, reader)
    assert len(reader.read) == 4


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": 3}', b'{"/a": {"state": 1}}'])
def test_a_damaged_memory_and_no_cache_folder_only_cost_time(content: bytes, cache: Path, tmp_path: Path) -> None:
    files, reader = files_of(tmp_path), Reader()
    found_in(files, "text", tmp_path, reader)
    (memory,) = (cache / layout.FOUND).iterdir()
    memory.write_bytes(content)
    assert found_in(files, "text", tmp_path, reader) == {file: {"text": "old"} for file in files}
    memory.unlink()
    memory.parent.rmdir()
    memory.parent.write_text("not a folder")
    assert found_in(files, "text", tmp_path, reader) == {file: {"text": "old"} for file in files}


def test_a_user_without_a_home_folder_only_waits_longer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("BITGENOME_CACHE")
    monkeypatch.setattr(Path, "home", no_home)
    files, reader = files_of(tmp_path), Reader()
    assert found_in(files, "text", tmp_path, reader) == {file: {"text": "old"} for file in files}
