"""Codebook types through the whole pipeline: llama.cpp runs the file, and agrees with what was scored."""

from tests.bitgenome.conftest import Runs, call_here

LEVELS = ["IQ2_XXS", "IQ4_XS", "W6"]


def test_a_file_of_codebook_types_runs_as_it_was_scored(runs: Runs) -> None:
    changes = {"search": {"strategy": "exact"}, "workers": {"ray": "off"}, "healing": {"enabled": "off"}}
    quick = {"refinement_rounds": 0, "compensation": False}  # how good the bytes are is shown elsewhere
    done = call_here("run", runs.write("codebooks", levels=LEVELS, quantization=quick, **changes))
    assert done.returncode == 0, done.stderr
    best = runs.best("codebooks")
    assert sum(fmt.startswith("IQ") for fmt in best["formats"].values()) > len(best["formats"]) // 2
    assert best["proof"]["simulated_to_runtime_kl"] <= 1e-3
    assert best["proof"]["file_bytes"] <= best["budget_bytes"]
    assert (runs.storage / "codebooks" / "imatrix.gguf").is_file()
