"""Every command of docs/guides is one of the command line; as a long test, each is run in its page's order."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from bitgenome.cli.main import app
from tests.conftest import REPOSITORY

GUIDES = sorted((REPOSITORY / "docs" / "guides").glob("*.md"))


def commands(page: Path) -> list[list[str]]:
    """The arguments of every ``bitgenome`` line of a page's code blocks."""
    lines = (line.strip() for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("    "))
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("bitgenome ")]


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_the_command_line_takes_every_command(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    group = get_command(app)
    assert commands(page)
    for name, *arguments in commands(page):
        command = group.commands[name]  # type: ignore[attr-defined]
        command.make_context(name, arguments)


@pytest.mark.long
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_every_command_runs_in_its_order(page: Path, tmp_path: Path) -> None:
    for folder in ("models", "configs"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "120"}
    for arguments in commands(page):
        done = subprocess.run(
            [sys.executable, "-m", "bitgenome.cli", *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (arguments, done.stderr[-2000:])
