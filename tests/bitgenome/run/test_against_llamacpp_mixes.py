"""The claim of the README, by llama.cpp's own numbers: far less loss than its own mixes in files of their size."""

import pytest

from benchmarks.llamacpp_mixes import export_mix
from bitgenome.common import layout
from bitgenome.run.proof import prove
from evaluators.data.windows import TokenWindows
from evaluators.model.folder import ModelFolder
from tests.bitgenome.conftest import SMALL, Runs
from tests.conftest import EMBEDDED

MIX = "Q3_K_M"  # benchmarks.llamacpp_mixes holds the others, with more text
MOST_OF_THEIR_KL = 0.6


@pytest.mark.long
def test_a_file_loses_at_least_forty_percent_less_than_llama_cpps_mix_of_its_size(runs: Runs) -> None:
    tokens = {"calibration": 40960, "sensitivity": 1024, "search": 1024, "validation": 1024, "test": 8192}
    changes = {"text": {**SMALL["text"], "window": 512, "tokens": tokens}, "search": {"strategy": "exact"}}  # type: ignore[dict-item]
    assert runs.call("run", runs.write("calibrated", **changes)).returncode == 0
    folder = ModelFolder(EMBEDDED)
    text = TokenWindows.load(runs.storage / "calibrated" / layout.WINDOWS)
    theirs = runs.storage / f"{MIX}.gguf"
    size = export_mix(folder, MIX, runs.storage / "calibrated" / layout.IMATRIX, theirs)
    done = runs.call("run", runs.write(f"against-{MIX}", **changes, budget={"file_size": size}))
    assert done.returncode == 0, done.stderr
    proof = runs.best(f"against-{MIX}")["proof"]
    assert proof["file_bytes"] <= size
    their_kl = prove(theirs, folder, text).figures.mean_kl.value
    assert proof["figures"]["mean_kl"]["value"] <= MOST_OF_THEIR_KL * their_kl
