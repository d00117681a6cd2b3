"""A model whose rows no 256-block divides goes the whole way in the types that llama.cpp falls back to."""

import pytest

from tests.bitgenome.conftest import Runs
from tests.exporters.conftest import SHARED_DATA, STORIES

STORIES_TEXT = SHARED_DATA / "text" / "tinystories_10k.txt"


@pytest.mark.skipif(not (STORIES.exists() and STORIES_TEXT.exists()), reason="needs the real Llama of 260,032 weights")
def test_a_llama_of_short_rows_is_searched_exported_and_proved(runs: Runs) -> None:
    text = {"source": "file", "path": str(STORIES_TEXT), "window": 128}
    config = runs.write(
        "stories",
        model=str(STORIES),
        text=text,
        budget={"bits_per_weight": 8.5},
        quantization={"keep_hessians": False},
        workers={"ray": "off"},
    )
    done = runs.call("run", config)
    assert done.returncode == 0, done.stderr
    assert not [file for file in runs.bank("stories").iterdir() if "passing" in file.name]
    best = runs.best("stories")
    assert set(best["formats"].values()) <= {"Q4_0", "Q5_0", "Q8_0", "F16"}
    assert 0.995 * best["budget_bytes"] <= best["winner"]["file_bytes"] <= best["budget_bytes"]
    assert best["proof"]["simulated_to_runtime_kl"] <= 1e-3
    perplexity = best["proof"]["figures"]["perplexity"]["value"]
    assert perplexity == pytest.approx(best["proof"]["simulated_perplexity"], rel=5e-3)
