"""A running search is resized through a file of its run directory."""

from pathlib import Path

import pytest

from bitgenome.worker_limit import LIMIT_FILE, read_limit, write_limit


def test_a_run_of_which_nobody_said_anything_has_no_limit(tmp_path: Path) -> None:
    assert read_limit(tmp_path) is None


def test_the_last_word_counts(tmp_path: Path) -> None:
    write_limit(tmp_path, 8)
    write_limit(tmp_path, 3)
    assert read_limit(tmp_path) == 3


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"most": "many"}'])
def test_what_cannot_be_read_is_no_limit(tmp_path: Path, content: str) -> None:
    (tmp_path / LIMIT_FILE).write_text(content)
    assert read_limit(tmp_path) is None


def test_a_search_without_workers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at least 1 worker, found 0"):
        write_limit(tmp_path, 0)
