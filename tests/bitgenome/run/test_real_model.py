"""A pretrained model from a package registry, through the command line to llama.cpp's own answer."""

import json
import subprocess
from pathlib import Path

import pytest
import xllamacpp

from benchmarks.smollm2 import smollm2
from tests.bitgenome.conftest import Runs

PROMPT, ANSWER = "The capital of France is", "Paris"
FACTOR = 1.5  # between the seconds that were forecast and those taken


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return smollm2(tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct.gguf")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no package registry: {error.stderr}")


def completion(file: Path, prompt: str) -> str:
    """What llama.cpp adds to ``prompt``, always taking the likeliest token."""
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.hostnames = ["127.0.0.1"]
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    answer = xllamacpp.Server(params).handle_completions({"prompt": prompt, "n_predict": 8, "temperature": 0.0})
    return str(answer["choices"][0]["text"])


@pytest.mark.long
def test_a_pretrained_model_of_thirty_blocks_still_knows_its_capitals_and_took_as_long_as_said(
    runs: Runs, gguf: Path
) -> None:
    changes = {
        "model": str(gguf),
        "budget": {"bits_per_weight": 5.5},
        "levels": ["W3", "W4", "W6"],
        "sensitivity": {"measure": "gradient"},
        "healing": {"steps": 10, "learning_rate": None},
    }
    done = runs.call("run", runs.write("real", **changes))
    assert done.returncode == 0, done.stderr
    best = runs.best("real")
    file = runs.storage / "real" / best["gguf"]
    assert ANSWER in completion(file, PROMPT)
    assert best["proof"]["simulated_to_runtime_kl"] < best["proof"]["figures"]["mean_kl"]["value"]
    record = json.loads((runs.storage / "real" / "run.json").read_text())
    expected = sum(record["forecast"].values())
    taken = sum(seconds for stage, seconds in record["stages"].items() if stage in record["forecast"])
    assert 1 / FACTOR < taken / expected < FACTOR, (record["forecast"], record["stages"])
