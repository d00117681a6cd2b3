"""The command line starts at once for commands that need no model and no cluster."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bitgenome.common import layout
from bitgenome.observe.logs import shown
from tests.bitgenome.conftest import call_here
from tests.conftest import REPOSITORY

SLOW = {"torch", "ray", "transformers", "pandas", "scipy", "optuna", "deap", "fsspec", "gguf"}


def imported_by(*arguments: str | Path) -> set[str]:
    """Top-level packages that the interpreter imports for ``python ARGUMENTS``, as it says itself."""
    command = [sys.executable, "-X", "importtime", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    packages = set(re.findall(r"^import time:[ \d|]+\| +(\w+)", done.stderr, re.MULTILINE))
    assert "bitgenome" in packages
    return packages


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ()])
def test_help_and_version_import_no_library_that_takes_seconds(arguments: tuple[str, ...]) -> None:
    assert imported_by("-m", "bitgenome.cli", *arguments) & (SLOW | {"pydantic", "numpy"}) == set()


def test_the_status_of_a_run_imports_no_library_that_takes_seconds(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / layout.RECORD).write_text("{}")
    (run / layout.EVALUATIONS).write_text("")
    assert imported_by("-m", "bitgenome.cli", "status", run) & SLOW == set()


@pytest.mark.parametrize("module", ["bitgenome.batch.state", "bitgenome.config.run", "bitgenome.cli.batch"])
def test_a_module_about_runs_loads_no_model_and_no_cluster(module: str) -> None:
    assert imported_by("-c", f"import {module}") & {"torch", "ray", "transformers"} == set()


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["resume", "--storage", "{}/runs", "fi"], ["first"]),
        (["plan", "{}/mi"], ["{}/mine.yaml", "{}/mixed/"]),
        (["doc"], ["doctor"]),
    ],
)
def test_a_shell_completes_commands_runs_and_configurations(
    typed: list[str], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in ("first", "second"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / layout.RECORD).write_text("{}")
    (tmp_path / "mixed").mkdir()
    for name in ("mine.yaml", "minor.txt"):
        (tmp_path / name).write_text("")
    words = [word.format(tmp_path) for word in typed]
    monkeypatch.setenv("_BITGENOME_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(["bitgenome", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    done = call_here()
    assert done.stdout.split() == [word.format(tmp_path) for word in expected]


def test_quiet_and_verbose_are_taken_on_both_sides_of_a_command_and_help_tells_the_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = []
    for words in (("-q", "status"), ("status", "-q"), ("-v", "status"), ("status", "--verbose"), ("status",)):
        assert call_here(*words, "--storage", tmp_path).returncode == 0
        levels.append(shown()[0].level)
    assert levels == [logging.WARNING, logging.WARNING, logging.DEBUG, logging.DEBUG, logging.INFO]
    assert "130 interrupted" in " ".join(call_here("-h").stdout.split())
