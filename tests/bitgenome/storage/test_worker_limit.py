"""A running search is resized through a file of its run directory."""

import logging
from pathlib import Path

import pytest

from bitgenome.common import layout
from bitgenome.storage.worker_limit import WorkerLimit, withdraw_limit, write_limit


def test_a_run_of_which_nobody_said_anything_has_no_limit(tmp_path: Path) -> None:
    assert WorkerLimit(tmp_path)() is None


def test_the_last_word_counts(tmp_path: Path) -> None:
    limit = WorkerLimit(tmp_path)
    write_limit(tmp_path, 8)
    assert limit() == 8
    write_limit(tmp_path, 3)
    assert limit() == 3
    (tmp_path / layout.WORKER_LIMIT).unlink()
    assert limit() is None


def test_a_limit_is_named_in_the_log_once_with_where_it_comes_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limit, file = WorkerLimit(tmp_path), tmp_path / layout.WORKER_LIMIT
    with caplog.at_level(logging.INFO, "bitgenome.storage.worker_limit"):
        for most, batch in ((2, "six"), (3, "six"), (3, None)):
            write_limit(tmp_path, most, batch)
            assert [limit(), limit()] == [most, most]
        file.unlink()
        assert [limit(), limit()] == [None, None]
    assert caplog.messages == [
        f"at most 2 workers, by {file} of the batch six",
        f"at most 3 workers, by {file} of the batch six",
        f"at most 3 workers, by {file}",
        f"as many workers as there is work for: {file} is gone",
    ]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"most": "many"}', '{"most": "3"}', '{"most": 2.0}', '{"most": true}']
)
def test_what_cannot_be_understood_is_no_limit_and_said_once(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    limit = WorkerLimit(tmp_path)
    (tmp_path / layout.WORKER_LIMIT).write_text(content)
    assert [limit(), limit(), limit()] == [None] * 3
    (warning,) = caplog.messages
    assert warning.startswith('expected {"most": a whole number of workers} in ') and repr(content) in warning


def test_a_search_without_workers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at least 1 worker, found 0"):
        write_limit(tmp_path, 0)


def test_a_batch_takes_its_own_limit_back_and_leaves_that_of_a_person(tmp_path: Path) -> None:
    limit = WorkerLimit(tmp_path)
    write_limit(tmp_path, 2, "killed")
    write_limit(tmp_path, 4, "six")
    assert limit() == 4
    withdraw_limit(tmp_path, "six")
    assert list(tmp_path.iterdir()) == []
    write_limit(tmp_path, 3)
    write_limit(tmp_path, 1, "six")
    withdraw_limit(tmp_path, "six")
    assert limit() == 3
