"""Workers, nodes and drivers killed at random moments; `python -m benchmarks.chaos` does it for twenty rounds."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.long  # single kills are tested in test_resume, test_s3, test_batch, test_jobs and test_ray_nodes
@pytest.mark.cluster
def test_rounds_of_kills_lose_no_evaluation_and_change_no_byte() -> None:
    command = [sys.executable, "-m", "benchmarks.chaos", "--quick", "--rounds", "3", "--seed", "3"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 rounds" in done.stdout
