"""Runs behind a URL: what is sent, what another machine finds, and who wins."""

import shutil
from pathlib import Path

import fsspec
import pytest

from bitgenome.common.errors import StorageError
from bitgenome.storage.mirror import RunMirror

LOG = "evaluations.jsonl"


class Machine:
    """A disk of its own, and a run on storage that all machines see."""

    def __init__(self, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch):
        self._cache, self._url, self._patch = folder / name, (folder / "nfs" / "run").as_uri(), monkeypatch
        self.mirror = self.started()

    def started(self) -> RunMirror:
        """As a driver does that starts here."""
        self._patch.setenv("BITGENOME_CACHE", str(self._cache))
        self.mirror = RunMirror(self._url)
        self.mirror.pull()
        return self.mirror

    def append(self, lines: str) -> None:
        with (self.mirror.path / LOG).open("a") as stream:
            stream.write(lines)

    def write(self, name: str, text: str) -> None:
        (self.mirror.path / name).write_text(text)

    def text(self, name: str) -> str:
        return (self.mirror.path / name).read_text()

    def wiped(self) -> None:
        shutil.rmtree(self._cache)


@pytest.fixture
def first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, "first", monkeypatch)


def segments(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted((folder / "nfs" / "run" / f"{LOG}.parts").iterdir())}


def test_only_new_whole_lines_go_up_and_segments_are_never_rewritten(first: Machine, tmp_path: Path) -> None:
    first.append("one\ntwo\nthr")
    first.mirror.push()
    first.append("ee\nfour\n")
    first.mirror.push()
    assert segments(tmp_path) == {f"{0:015d}": "one\ntwo\n", f"{8:015d}": "three\nfour\n"}


def test_another_machine_finds_the_run_and_the_first_one_follows_it(
    first: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first.append("one\n")
    first.write("checkpoint.json", "1")
    first.mirror.push()
    first.append("in flight\n")  # not sent when the first machine died
    second = Machine(tmp_path, "second", monkeypatch)
    assert (second.text(LOG), second.text("checkpoint.json")) == ("one\n", "1")
    second.append("two\n")
    second.mirror.push()
    first.started()
    assert first.text(LOG) == "one\ntwo\n"


def test_a_machine_that_comes_back_alone_keeps_what_it_had_not_sent(first: Machine) -> None:
    first.append("one\n")
    first.mirror.push()
    first.append("in flight\n")
    first.started()
    assert first.text(LOG) == "one\nin flight\n"


def test_a_wiped_disk_is_filled_again(first: Machine) -> None:
    first.append("one\n")
    first.write("run.json", "{}")
    first.mirror.push()
    first.wiped()
    first.started()
    assert (first.text(LOG), first.text("run.json")) == ("one\n", "{}")


def test_what_has_not_changed_is_not_sent_again(first: Machine, tmp_path: Path) -> None:
    first.write("model.gguf", "bytes")
    first.mirror.push()
    remote = tmp_path / "nfs" / "run" / "model.gguf"
    before = remote.stat().st_ino
    first.write("model.gguf", "bytes")  # anew, with the same content
    first.mirror.push()
    first.wiped()
    first.started()
    first.mirror.push()
    assert remote.stat().st_ino == before


def test_a_driver_that_was_replaced_cannot_add_lines(
    first: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = first.mirror
    first.append("one\n")
    stale.push()
    second = Machine(tmp_path, "second", monkeypatch)
    second.append("of the second\n")
    second.mirror.push()
    first.append("of the first\n")
    with pytest.raises(StorageError, match="expected lines of this run"):
        stale.push()
    assert list(segments(tmp_path).values()) == ["one\n", "of the second\n"]


def test_a_push_that_died_half_way_is_finished_by_the_next(
    first: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first.append("one\n")
    remote = tmp_path / "nfs" / "run"
    (remote / f"{LOG}.parts").mkdir()
    (remote / f"{LOG}.parts" / f"{0:015d}").write_text("one\n")  # as sent just before the driver was killed
    first.append("two\n")
    first.started().push()
    assert list(segments(tmp_path).values()) == ["one\n", "two\n"]
    assert Machine(tmp_path, "second", monkeypatch).text(LOG) == "one\ntwo\n"


def test_a_name_that_would_lead_out_of_the_mirror_is_not_fetched(first: Machine, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    system = fsspec.filesystem("memory")
    for name in (f"run/{outside}/evil", "run/../evil", "run/.hidden", "run//evil", "run/run.json"):
        system.pipe_file(f"/runs/{name}", b"{}")
    mirror = RunMirror("memory://runs/run")
    mirror._remote.write("version.json", b'{"version": "of another"}')
    mirror.pull()
    assert [file.name for file in mirror.path.iterdir() if file.name[0] != "."] == ["run.json"]
    assert not outside.exists()


def test_how_many_workers_a_run_may_hold_here_is_not_the_runs_own(
    first: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first.append("one\n")
    first.write("workers.json", '{"most": 1}')
    first.mirror.push()
    second = Machine(tmp_path, "second", monkeypatch)
    assert not (second.mirror.path / "workers.json").exists()
    second.append("two\n")
    second.mirror.push()
    first.started()
    assert (first.text(LOG), first.text("workers.json")) == ("one\ntwo\n", '{"most": 1}')


def test_a_reader_never_sees_a_checkpoint_ahead_of_its_evaluations(first: Machine, tmp_path: Path) -> None:
    first.append("one\n")
    for name in ("checkpoint.json", "best.json", "run.json"):
        first.write(name, "{}")
    first.mirror.push()
    remote = tmp_path / "nfs" / "run"
    times = [(remote / name).stat().st_mtime_ns for name in (f"{LOG}.parts/{0:015d}", "best.json", "run.json")]
    assert all(time <= (remote / "checkpoint.json").stat().st_mtime_ns for time in times)


def test_storage_that_was_emptied_gets_everything_again(first: Machine, tmp_path: Path) -> None:
    first.append("one\n")
    first.write("run.json", "{}")
    first.mirror.push()
    shutil.rmtree(tmp_path / "nfs")
    first.started().push()
    assert segments(tmp_path) == {f"{0:015d}": "one\n"}
    assert (tmp_path / "nfs" / "run" / "run.json").is_file()
