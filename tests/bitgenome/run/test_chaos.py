"""Workers, nodes and drivers killed at random moments; `python -m benchmarks.chaos` does it for twenty rounds."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("rounds", [1, pytest.param(3, marks=pytest.mark.long)])
def test_rounds_of_kills_lose_no_evaluation_and_change_no_byte(rounds: int) -> None:
    command = [sys.executable, "-m", "benchmarks.chaos", "--quick", "--rounds", str(rounds), "--seed", "3"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{rounds} rounds" in done.stdout
