"""The command line starts at once for commands that need no model and no cluster."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bitgenome.common import layout
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
