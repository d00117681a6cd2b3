"""A disk that fills up, for real: by a limit on file sizes, and by a small file system where one can be mounted."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from bitgenome.common.errors import StorageError
from bitgenome.common.files import atomic_write_text
from search.loop.archive import EvaluationLog
from search.types import Evaluation
from tests.conftest import REPOSITORY

APPEND = """
import resource, sys
from tests.search.loop.test_full_disk import evaluation
from search.loop.archive import EvaluationLog
from bitgenome.common.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
log = EvaluationLog(sys.argv[1])
try:
    while True:
        log.append(evaluation(len(log)))
except StorageError as error:
    print(len(log), error)
log.close()
"""


def evaluation(number: int) -> Evaluation:
    return Evaluation((number,), 1.0 + number, 1.0, 1.0, 1.0, math.nan, 100, "search", 256)


@pytest.mark.parametrize("limit", [1000, 2003])
def test_every_evaluation_that_was_told_is_there_after_the_disk_was_full(limit: int, tmp_path: Path) -> None:
    path = tmp_path / "evaluations.jsonl"
    command = [sys.executable, "-c", APPEND, str(path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    count, _, sentence = done.stdout.strip().partition(" ")
    assert sentence == f"expected to write {path}, found: File too large: make room, then resume"
    assert path.stat().st_size == limit  # with a torn line at its end
    log = EvaluationLog(path)
    assert [e.genome for e in log] == [(number,) for number in range(int(count))]
    log.append(evaluation(int(count)))
    assert len(EvaluationLog(path)) == int(count) + 1


def test_a_full_file_system_keeps_the_old_content_and_says_so(small_disk: Path) -> None:
    path = small_disk / "checkpoint.json"
    atomic_write_text(path, json.dumps({"generation": 1}))
    with pytest.raises(StorageError, match=f"expected to write {path}, found: No space left on device: make room"):
        atomic_write_text(path, "x" * 100_000)
    assert json.loads(path.read_text()) == {"generation": 1}
    assert [file.name for file in small_disk.iterdir()] == ["checkpoint.json"]


def test_evaluations_go_on_where_a_full_file_system_got_room(small_disk: Path) -> None:
    path, filler = small_disk / "evaluations.jsonl", small_disk / "filler"
    log = EvaluationLog(path)
    log.append(evaluation(0))
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(b"x" * 100_000)
    with pytest.raises(StorageError, match="No space left on device"):
        for number in range(1, 100):
            log.append(evaluation(number))
    told = len(log)
    log.close()
    filler.unlink()
    again = EvaluationLog(path)
    assert len(again) == told
    again.append(evaluation(told))
    again.close()
