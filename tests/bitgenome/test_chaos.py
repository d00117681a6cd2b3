"""Workers, nodes and drivers killed at random moments; `python -m benchmarks.chaos` does it for twenty rounds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow
@pytest.mark.cluster
def test_three_rounds_of_kills_lose_no_evaluation_and_change_no_byte(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.chaos", "--rounds", "3", "--seed", "3"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 rounds" in done.stdout
