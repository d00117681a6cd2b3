"""``bitgenome status`` tells from a run directory alone what its run does, whatever state its files are in."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bitgenome.cli import terminal
from bitgenome.cli.main import main
from bitgenome.cli.status import duration
from bitgenome.common import layout
from bitgenome.config.run import load_config
from bitgenome.observe.run_status import RunReader
from bitgenome.report.source import RunSource
from bitgenome.storage.lease import is_owned
from bitgenome.storage.run_directory import RunDirectory
from bitgenome.storage.run_files import LocalRunFiles
from tests.bitgenome.cli.test_bad_input import refusal
from tests.bitgenome.conftest import Finished, Runs
from tests.conftest import REPOSITORY


def evaluation(gene: int, loss: float | None, **fields: Any) -> dict[str, Any]:
    record = {"genome": [gene, 0], "loss": loss, "kl": loss, "file_bytes": 1000 + gene, "split": "search"}
    return record | {"tokens": 512, "draw": 0} | fields


def append(path: Path, *records: dict[str, Any], end: str = "\n") -> None:
    with path.open("a") as stream:
        stream.write("\n".join(map(json.dumps, records)) + end)


@pytest.fixture
def run(runs: Runs, request: pytest.FixtureRequest) -> RunDirectory:
    """A new run directory of the test's own."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name).strip("-")
    directory = RunDirectory.create(load_config(runs.write(name, workers={"ray": "off"})))
    directory.record |= {"weights": 4000, "expected_evaluations": 24}
    directory.record.save()
    return directory


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> str:
    monkeypatch.setattr(sys, "argv", ["bitgenome", "status", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    return capsys.readouterr().out


def test_a_run_with_a_living_driver_is_running_and_one_without_is_not(run: RunDirectory) -> None:
    reader = RunReader(run.path)
    assert reader.read().state == "stopped"
    with run.own():
        assert reader.read().state == "running"
    assert reader.read().state == "stopped"
    with pytest.raises(ZeroDivisionError), run.record.ending():
        _ = 1 / 0
    assert (reader.read().state, reader.read().error) == ("failed", "division by zero")
    with pytest.raises(KeyboardInterrupt), run.record.ending():
        raise KeyboardInterrupt
    assert (reader.read().state, reader.read().error) == ("stopped", None)
    with run.record.ending():
        pass
    assert reader.read().state == "finished"


def test_a_driver_that_was_killed_is_not_running(run: RunDirectory) -> None:
    code = (
        "import os, sys, pathlib; from bitgenome.storage.run_directory import RunDirectory\n"
        "directory = RunDirectory.open(pathlib.Path(sys.argv[1]))\n"
        "with directory.own(): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(run.path)], cwd=REPOSITORY, check=False)
    assert list((run.path / layout.LEASE).iterdir())
    assert RunReader(run.path).read().state == "stopped"


def test_progress_grows_with_the_files_and_half_written_lines_wait_for_their_end(run: RunDirectory) -> None:
    reader, log = RunReader(run.path), run.path / "evaluations.jsonl"
    assert (reader.read().evaluations, reader.read().best_loss) == (0, None)
    append(log, evaluation(0, 0.5), evaluation(1, 0.25), evaluation(1, None))
    append(log, evaluation(2, 0.125), end="")
    found = reader.read()
    assert (found.evaluations, found.best_loss, found.best_kl, found.best_bytes) == (2, 0.25, 0.25, 1001)
    assert found.bits_per_weight == 8 * 1001 / 4000
    append(log, end="\n")
    assert (reader.read().evaluations, reader.read().best_loss) == (3, 0.125)
    append(log, evaluation(3, 0.01, tokens=0), evaluation(4, 0.3, draw=1), evaluation(5, 0.01, split="test"))
    found = reader.read()
    assert (found.evaluations, found.best_loss) == (5, 0.3), "the best is that of the search's present text"
    log.write_text("")
    append(log, evaluation(7, 0.75))
    (run.path / "generations.jsonl").write_text('{"generation": 2}\n{"generation": 3, "genom')
    assert reader.read().generation == 2


def test_a_report_reads_every_evaluation_once(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bytes] = []
    lines = LocalRunFiles.lines

    def spied(files: LocalRunFiles, name: str, start: int = 0) -> Iterator[bytes]:
        for line in lines(files, name, start):
            if name == layout.EVALUATIONS:
                read.append(line)
            yield line

    monkeypatch.setattr(LocalRunFiles, "lines", spied)
    log, source = run.path / "evaluations.jsonl", RunSource(run.path)
    append(log, evaluation(0, 0.5), evaluation(1, 0.25), evaluation(2, 0.1, split="test"))
    view = source.read()
    assert ([one.loss for one in view.scored], len(view.tested), view.status.evaluations) == ([0.5, 0.25], 1, 2)
    append(log, evaluation(3, 0.125))
    assert (len(source.read().scored), len(read)) == (3, 4)


@pytest.mark.parametrize("name", ["evaluations.jsonl", "generations.jsonl", "best.json", "run.json"])
@pytest.mark.parametrize("content", [b"\xff\x00{[\n", b'{"no": "such"}\n', b'"text"\n', b"[1]\n"], ids=range(4))
def test_a_file_that_no_run_writes_is_said_and_does_not_hide_other_runs(
    run: RunDirectory, name: str, content: bytes
) -> None:
    if name == "best.json":
        run.record["ended"] = "finished"
        run.record.save()
    (run.path / name).write_bytes(content)
    reader = RunReader(run.path)
    for _ in range(2):
        found = reader.read()
        assert found.state == "damaged" and str(found.error).startswith("expected ")
        assert str(run.path / name) in str(found.error) and "\n" not in str(found.error)


def test_a_run_whose_record_is_empty_is_shown_among_the_others(run: RunDirectory) -> None:
    (run.path / "run.json").write_bytes(b"")
    found = RunReader(run.path).read()
    assert (found.state, "found an empty file" in str(found.error)) == ("damaged", True)


def test_files_that_are_not_there_or_torn_are_passed_over(run: RunDirectory) -> None:
    (run.path / "events.log").write_bytes(b"\xff\x00{[\n\n")
    (run.path / "evaluations.jsonl").write_bytes(b'{"genome": [1')
    found = RunReader(run.path).read()
    assert (found.state, found.evaluations, found.generation, found.expected) == ("stopped", 0, 0, 24)


def test_the_time_left_follows_the_rate_of_this_attempt(run: RunDirectory) -> None:
    log = run.path / "evaluations.jsonl"
    append(log, *(evaluation(n, 1.0) for n in range(8)))
    with run.own(), run.stage("search"):
        reader = RunReader(run.path)
        assert reader.read().seconds_left is None
        run.record["stage"]["since"] = time.time() - 10
        run.record.save()
        append(log, *(evaluation(n, 1.0) for n in range(8, 12)))
        found = reader.read()
        assert found.seconds_left == pytest.approx(12 * 10 / 4, rel=0.1)
        assert found.stage == "search" and found.seconds["search"] == pytest.approx(10, rel=0.1)
    assert reader.read().seconds_left is None
    assert [duration(s) for s in (5, 125, 7500)] == ["5 s", "2 min", "2 h 5 min"]


def test_a_finished_run_shows_what_ships(
    finished: Finished, runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    best = runs.best("base")
    found = json.loads(said(capsys, monkeypatch, "base", "--storage", runs.storage, "--json"))
    assert (found["state"], found["stage"], found["generation"]) == ("finished", "proof", 3)
    assert (found["evaluations"], found["expected"]) == (24, 24)
    assert found["best_kl"] == best["healing"]["validation"]["after"]["kl"] < best["winner"]["kl"], "as it ships"
    assert (found["best_on"], found["healed"], found["best_loss"]) == ("validation", True, best["winner"]["loss"])
    assert found["bits_per_weight"] == pytest.approx(best["bits_per_weight"])
    assert found["budget_bytes"] == best["budget_bytes"] and found["workers"] == 2
    text = said(capsys, monkeypatch, runs.storage / "base", "--watch")
    assert text.startswith("base: finished, proof, generation 3, 24 of 24 evaluations, KL 0.0")
    assert f"KL {found['best_kl']:.6f} on validation text, healed, in" in text
    table = said(capsys, monkeypatch, "--storage", runs.storage)
    assert "24 of 24" in table and f"{best['winner']['file_bytes']:,}" in table
    monkeypatch.setattr(terminal.console, "width", 40)
    narrow = said(capsys, monkeypatch, "--storage", runs.storage)
    assert "base\n" in narrow and f"{best['winner']['file_bytes']:,}" in narrow and "…" not in narrow


@dataclass(frozen=True)
class Remote:
    """A run behind a URL whose driver has sent two evaluations and lives."""

    url: str
    name: str
    mirror: Path

    @property
    def location(self) -> str:
        return f"{self.url}/{self.name}"

    @property
    def claim(self) -> Path:
        """The driver's, where storage is a file system."""
        return next((Path(self.location.removeprefix("file://")) / layout.LEASE).iterdir())


@contextmanager
def driven(runs: Runs, url: str, disk: Path, name: str = "far") -> Iterator[Remote]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITGENOME_CACHE", str(disk))
        config = load_config(runs.write(name, storage_path=url, workers={"ray": "off"}))
        with RunDirectory.owned(config) as directory:
            append(directory.path / "evaluations.jsonl", evaluation(0, 0.5))
            (directory.path / "events.log").write_text("12:00 bank\n")
            with directory.stage("search"):
                directory.sync()
                append(directory.path / "evaluations.jsonl", evaluation(1, 0.25), evaluation(2, 0.125))
                directory.sync()
                yield Remote(url, name, directory.path)


def test_status_of_a_url_reads_what_is_remote_and_touches_no_mirror(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITGENOME_CACHE", str(tmp_path / "another disk"))
    url = (tmp_path / "nfs").as_uri()
    with driven(runs, url, tmp_path / "disk") as run:
        reader = RunReader(run.location)
        found = reader.read()
        assert (found.state, found.stage, found.evaluations, found.best_loss) == ("running", "search", 3, 0.125)
        assert (found.name, found.path, found.last_line) == ("far", run.location, "12:00 bank")
        append(run.mirror / "evaluations.jsonl", evaluation(3, 0.0625))
        assert reader.read().evaluations == 3, "what is not sent is not there"
        for arguments in ([run.location], ["far", "--storage", url], ["--storage", url]):
            assert json.loads(said(capsys, monkeypatch, *arguments, "--json"))["state"] == "running"
    found = reader.read()
    assert (found.state, found.evaluations) == ("finished", 4)
    assert not (tmp_path / "another disk").exists()


def test_a_mirror_shows_its_run_as_living_as_its_lease_at_the_url_is(runs: Runs, tmp_path: Path) -> None:
    with driven(runs, (tmp_path / "nfs").as_uri(), tmp_path / "disk") as run:
        assert RunReader(run.mirror).read().state == "running"
        copy = shutil.copytree(run.mirror, tmp_path / "elsewhere" / "far")
        assert RunReader(copy).read().state == "stopped", "a copy is nobody's run"
    assert RunReader(run.mirror).read().state == "finished"


def test_a_driver_on_another_machine_lives_as_long_as_its_beats_are_young(runs: Runs, tmp_path: Path) -> None:
    with driven(runs, (tmp_path / "nfs").as_uri(), tmp_path / "disk") as run:
        mine = run.claim.read_text()
        run.claim.write_text(json.dumps(json.loads(mine) | {"machine": "another", "beaten": 0.0}))
        assert is_owned(run.location)
        os.utime(run.claim, (time.time() - 120, time.time() - 120))
        assert not is_owned(run.location)
        run.claim.write_text(mine)


@pytest.mark.parametrize(
    ("location", "sentence"),
    [
        ("file:///nowhere/at/all", "expected a storage path with runs, found none at file:///nowhere/at/all"),
        ("s3://key:secret@genomes/x", "expected --storage in bitgenome status without a password, found one in its"),
    ],
)
def test_a_url_without_runs_is_answered_in_one_sentence(
    location: str, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = refusal(capsys, monkeypatch, "status", "--storage", location)
    assert sentence in told and "secret" not in told


def test_a_run_that_is_not_there_is_answered_in_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["bitgenome", "status", "nobody", "--storage", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    found = f"a run directory with run.json, or the name of a run in {tmp_path}, found neither at nobody"
    assert capsys.readouterr().err == f"error: expected {found}\n"
