"""Files of a run: atomic writes, the append-only log and the checkpoint."""

import json
import math
import stat
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from bitgenome.common.files import atomic_write_bytes, atomic_write_json, atomic_write_text
from search.loop.archive import EvaluationLog
from search.loop.checkpoint import SCHEMA_VERSION, Checkpoint
from search.types import Evaluation, Fidelity

FIRST = Evaluation((0, 1), 0.1, 0.1, 0.2, 9.0, 0.3, 1000, "search", 64, 0.5)
SECOND = replace(FIRST, genome=(1, 0), loss=0.2)


def test_an_atomic_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    for text in ("old", "new"):
        atomic_write_text(path, text)
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["best.json"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444


def test_a_failed_write_leaves_the_old_content_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    atomic_write_bytes(path, b"old")
    with pytest.raises(TypeError):
        atomic_write_bytes(path, "not bytes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="JSON"):
        atomic_write_json(path, {"loss": math.nan})
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["best.json"]


def filled_log(path: Path) -> EvaluationLog:
    log = EvaluationLog(path)
    for evaluation in (FIRST, SECOND):
        log.append(evaluation)
    log.sync()
    log.close()
    return log


def test_evaluations_come_back_in_order_and_by_genome_and_fidelity(tmp_path: Path) -> None:
    filled_log(tmp_path / "evaluations.jsonl")
    log = EvaluationLog(tmp_path / "evaluations.jsonl")
    assert list(log) == [FIRST, SECOND]
    assert log.get((1, 0), Fidelity("search", 64)) == SECOND
    assert log.get((1, 0), Fidelity("validation", 64)) is None
    assert list(log.at(Fidelity("validation", 64))) == []


def test_a_torn_last_line_is_cut_off_whatever_byte_it_was_torn_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "evaluations.jsonl"
    filled_log(path)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first + 1, len(whole)):
        path.write_bytes(whole[:length])
        log = EvaluationLog(path)
        assert list(log) == [FIRST]
        assert path.read_bytes() == whole[:first]
        log.append(SECOND)
        log.close()
        assert path.read_bytes() == whole
    assert "cut a torn last line" in caplog.text


def test_the_same_genome_and_fidelity_never_get_a_second_line(tmp_path: Path) -> None:
    log = EvaluationLog(tmp_path / "evaluations.jsonl")
    log.append(FIRST)
    log.append(replace(FIRST, tokens=128))
    with pytest.raises(ValueError, match="is already in"):
        log.append(replace(FIRST, loss=0.7))
    assert len(log) == len(log.path.read_bytes().splitlines()) == 2


def test_a_broken_or_repeated_line_in_the_middle_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.jsonl"
    filled_log(path)
    first, second = path.read_bytes().splitlines(keepends=True)
    for lines, message in (
        ([first, b"{}\n", second], "an evaluation in line 2 of .*: remove that line"),
        ([first, first], "line 2"),
    ):
        path.write_bytes(b"".join(lines))
        with pytest.raises(ValueError, match=message):
            EvaluationLog(path)


def test_a_loss_that_is_no_number_stays_strict_json_and_comes_back_as_nan(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.jsonl"
    log = EvaluationLog(path)
    log.append(replace(FIRST, loss=math.inf, kl=math.nan))
    log.close()
    assert json.loads(path.read_text())["loss"] is None
    (evaluation,) = EvaluationLog(path)
    assert math.isnan(evaluation.loss)
    assert math.isnan(evaluation.kl)


def test_a_checkpoint_comes_back_and_none_is_none(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "checkpoint.json", "abc")
    assert checkpoint.load() is None
    checkpoint.save({"generation": 3})
    assert checkpoint.load() == {"generation": 3}


def test_what_was_told_is_written_once_and_what_is_behind_the_checkpoint_does_not_count(tmp_path: Path) -> None:
    def state(since: int, *batches: int) -> dict[str, object]:
        return {"strategy": {"told_before": since, "told": [[batch] for batch in batches]}}

    checkpoint = Checkpoint(tmp_path / "checkpoint.json", "abc")
    checkpoint.save(state(0, 1, 2))
    checkpoint.save(state(2, 3))
    text = (tmp_path / "checkpoint.json").read_bytes()
    checkpoint.save(state(3, 4))
    (tmp_path / "checkpoint.json").write_bytes(text)  # as if the last one had died in between
    resumed = Checkpoint(tmp_path / "checkpoint.json", "abc")
    assert resumed.load() == state(0, 1, 2, 3)
    resumed.save(state(3, 5))
    assert (tmp_path / "checkpoint-told.jsonl").read_text() == "[1]\n[2]\n[3]\n[5]\n"
    (tmp_path / "checkpoint-told.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="expected 4 batches in 16 bytes of .*, found 1"):
        Checkpoint(tmp_path / "checkpoint.json", "abc").load()


def test_a_checkpoint_that_holds_what_was_told_itself_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.json"
    old = {"generation": 2, "strategy": {"told": [[1], [2]]}}
    path.write_text(json.dumps({"schema_version": 2, "digest": "abc", "state": old}))
    checkpoint = Checkpoint(path, "abc")
    assert checkpoint.load() == old
    assert checkpoint.told.batches == 0  # the next save writes all


def test_the_best_of_a_text_come_in_order_without_the_others(tmp_path: Path) -> None:
    log = EvaluationLog(tmp_path / "evaluations.jsonl")
    for number, loss in enumerate((0.5, math.nan, 0.1, 0.3, 0.2)):
        log.append(replace(FIRST, genome=(number,), loss=loss))
    log.append(replace(FIRST, genome=(9,), loss=0.01, tokens=FIRST.tokens + 1))
    assert [e.genome for e in log.best(FIRST.fidelity, 3)] == [(2,), (4,), (3,)]
    assert [e.genome for e in log.best(FIRST.fidelity, 9)] == [(2,), (4,), (3,), (0,), (1,)]
    assert (log.genomes(FIRST.split), log.genomes("test")) == (6, 0)


def test_a_checkpoint_of_another_configuration_or_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.json"
    Checkpoint(path, "abc").save({})
    with pytest.raises(ValueError, match=r"another configuration \(digest abc, expected def\)"):
        Checkpoint(path, "def").load()
    for text, message in (
        (json.dumps({"schema_version": SCHEMA_VERSION + 1}), f"schema version {SCHEMA_VERSION + 1}, expected"),
        ("[]", "expected a checkpoint in"),
        ('{"schema', "expected a checkpoint in"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            Checkpoint(path, "abc").load()


def test_an_evaluation_takes_little_memory_whatever_its_genes_and_windows(tmp_path: Path) -> None:
    log = EvaluationLog(tmp_path / "evaluations.jsonl")

    def fill(first: int, last: int) -> None:
        for number in range(first, last):
            genome = (*divmod(number, 256), *[number % 7] * 500)
            log.append(replace(FIRST, genome=genome, window_kl=tuple(float(number + w) for w in range(64))))

    fill(0, 1000)
    tracemalloc.start()
    fill(1000, 5000)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken / 4000 < 400
    found = log.get((0, 8, *[1] * 500), FIRST.fidelity)
    assert found is not None
    assert found.window_kl == tuple(float(8 + w) for w in range(64))
