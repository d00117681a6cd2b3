"""Logs: JSON objects where they are asked for, lines for people in the run's own file, both with run and generation."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitgenome.observe.logs import GENERATION, RUN, JsonFormatter, log_file
from tests.bitgenome.conftest import Runs

log = logging.getLogger("bitgenome.test")


@pytest.fixture
def third_generation() -> Iterator[None]:
    run, generation = RUN.set("stdlib-6m"), GENERATION.set(3)
    yield
    RUN.reset(run)
    GENERATION.reset(generation)


def record(message: str, error: BaseException | None = None) -> logging.LogRecord:
    found = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord("bitgenome.test", logging.INFO, "file.py", 1, message, ("ü\n",), found)


def test_a_json_record_is_one_line_with_run_and_generation(third_generation: None) -> None:
    try:
        raise ValueError("expected")
    except ValueError as error:
        text = JsonFormatter().format(record("found %s", error))
    assert "\n" not in text
    fields = json.loads(text)
    assert (fields["message"], fields["run"], fields["generation"]) == ("found ü\n", "stdlib-6m", 3)
    assert fields["exc_text"].endswith("ValueError: expected")


def test_outside_a_run_a_json_record_has_neither() -> None:
    fields = json.loads(JsonFormatter().format(record("found %s")))
    assert fields["run"] is None and fields["generation"] is None


def test_the_log_of_a_run_stays_lines_and_says_the_generation(third_generation: None, tmp_path: Path) -> None:
    logging.getLogger().setLevel(logging.INFO)
    with log_file(tmp_path / "events.log", "stdlib-6m"):
        log.info("inside")
        GENERATION.set(None)
        log.info("afterwards")
    log.info("outside")
    lines = [line.split(" ", 2)[2] for line in (tmp_path / "events.log").read_text().splitlines()]
    assert lines == ["INFO bitgenome.test [stdlib-6m g3] inside", "INFO bitgenome.test afterwards"]


def test_with_json_a_users_mistake_is_an_error_record(runs: Runs, tmp_path: Path) -> None:
    done = runs.call("--log-json", "plan", tmp_path / "missing.yaml")
    (line,) = done.stderr.splitlines()
    fields = json.loads(line)
    assert done.returncode == 2 and fields["levelname"] == "ERROR"
    assert fields["message"].startswith("expected a configuration file, found nothing at")
