"""A run from YAML to a GGUF that llama.cpp runs: the promises of the README."""

import json

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file

from evaluators.healing.scales import ScaledBank, divided
from evaluators.model.folder import ModelFolder
from exporters.metadata.tensor_names import tensor_table
from quantizers.formats.table import FORMATS
from tests.bitgenome.conftest import Finished, Runs, call_here
from tests.conftest import EMBEDDED


def test_the_file_keeps_the_budget_and_nearly_fills_it(runs: Runs, finished: Finished) -> None:
    best = runs.best("base")
    size = (runs.storage / "base" / best["gguf"]).stat().st_size
    assert size == best["winner"]["file_bytes"]
    assert 0.995 * best["budget_bytes"] <= size <= best["budget_bytes"]


def test_every_shipped_tensor_decodes_to_the_weights_that_were_measured(runs: Runs, finished: Finished) -> None:
    """By gguf's own decoder: the bank's bytes, with the scales that healing took."""
    best, healed = runs.best("base"), load_file(runs.storage / "base" / "healed.safetensors")
    bank, folder = ScaledBank(runs.bank("base"), divided(healed)[1]), ModelFolder(EMBEDDED)
    names = {entry.gguf_name: entry.hf_name for entry in tensor_table(folder)}
    compared = 0
    for tensor in GGUFReader(runs.storage / "base" / best["gguf"]).tensors:
        name = names[tensor.name]
        if name not in best["formats"]:
            assert tensor.tensor_type.name == "F32"
            continue
        fmt = FORMATS[best["formats"][name]]
        assert tensor.tensor_type.name == fmt.name
        shipped = dequantize(tensor.data, tensor.tensor_type)
        measured = bank.weights(name, fmt, folder.shapes[name][1], torch.device("cpu")).numpy()
        assert np.array_equal(shipped, measured)
        compared += 1
    assert compared == len(best["formats"]) == 43


def test_llama_cpp_agrees_with_the_simulation(runs: Runs, finished: Finished) -> None:
    proof = runs.best("base")["proof"]
    assert proof["simulated_to_runtime_kl"] <= 1e-3
    kl, perplexity = (proof["figures"][name]["value"] for name in ("mean_kl", "perplexity"))
    assert perplexity == pytest.approx(proof["simulated_perplexity"], rel=5e-3)
    assert kl == pytest.approx(proof["simulated_kl"], rel=0.1)
    assert proof["generated_tokens_per_second"] > 0


def test_the_winner_is_no_worse_than_its_seeds_and_uniform_levels_on_validation_text(
    runs: Runs, finished: Finished
) -> None:
    best = runs.best("base")
    validated = [e for e in runs.evaluations("base") if e["split"] == "validation"]
    assert len(validated) >= 5
    assert best["winner"]["loss"] == min(e["loss"] for e in validated)


def test_the_closing_table_names_files_figures_and_baselines(runs: Runs, finished: Finished) -> None:
    for words in ("searched", "exact kl", "uniform W3", "uniform W6", "llama.cpp", "recipe.txt", ".gguf", "under"):
        assert words in finished.stdout, words
    assert "Traceback" not in finished.stderr


def test_every_generation_has_a_line_that_says_how_it_was_predicted(runs: Runs, finished: Finished) -> None:
    lines = (runs.storage / "base" / "generations.jsonl").read_text().splitlines()
    first, *others = [json.loads(line) for line in lines]
    assert [record["generation"] for record in (first, *others)] == [1, 2, 3]
    assert "screened" not in first
    for record in others:
        assert record["surrogate_correlation"] > 0.5, "a search seeded by sensitivities is easy to predict"
        assert record["surrogate_coverage"] >= 0.5, "most losses lie within one predicted standard deviation"
        within = f"{100 * record['surrogate_coverage']:.0f} % within their error"
        said = f"(rank correlation {record['surrogate_correlation']:.2f}, {within}) chose the offspring"
        assert said in " ".join(finished.stderr.split())


def test_no_genome_is_evaluated_twice(runs: Runs, finished: Finished) -> None:
    keys = [(tuple(e["genome"]), e["split"], e["tokens"]) for e in runs.evaluations("base")]
    assert len(keys) == len(set(keys))


def test_the_recipe_lists_every_tensor_for_llama_quantize(runs: Runs, finished: Finished) -> None:
    recipe = (runs.storage / "base" / "recipe.txt").read_text().splitlines()
    assert len(recipe) == 43 and all(line.startswith("^") and "=" in line for line in recipe)
    assert any(line.startswith(r"^blk\.3\.attn_q\.weight$=q") for line in recipe)


def test_a_finished_run_continues_in_place_without_evaluating_again(runs: Runs, finished: Finished) -> None:
    before, best = runs.evaluations("base"), runs.best("base")
    again = call_here("run", runs.write("base"), "--set", "workers.ray=off")
    assert again.returncode == 0, again.stderr
    assert runs.evaluations("base") == before
    assert runs.best("base")["winner"] == best["winner"]


def test_one_process_finds_what_two_ray_workers_find(runs: Runs, finished: Finished) -> None:
    done = call_here("run", runs.write("serial", workers={"ray": "off"}))
    assert done.returncode == 0, done.stderr
    assert runs.evaluations("serial") == runs.evaluations("base")
    healed = [(runs.storage / name / "healed.safetensors").read_bytes() for name in ("serial", "base")]
    assert healed[0] == healed[1]


def test_export_and_verify_repeat_what_the_run_reported(runs: Runs, finished: Finished) -> None:
    best = runs.best("base")
    gguf = runs.storage / "base" / best["gguf"]
    shipped = gguf.read_bytes()
    gguf.unlink()
    assert call_here("export", runs.storage / "base").returncode == 0
    assert gguf.read_bytes() == shipped
    verified = call_here("verify", gguf)
    assert verified.returncode == 0, verified.stderr
    assert f"{best['proof']['figures']['mean_kl']['value']:.5f}" in verified.stdout


@pytest.mark.parametrize("strategy", ["optuna", pytest.param("random", marks=pytest.mark.long)])  # exact: codebooks
def test_every_strategy_does_the_whole_job_alone(strategy: str, runs: Runs, finished: Finished) -> None:
    changes = {"search": {"strategy": strategy}, "workers": {"ray": "off"}, "healing": {"enabled": "off"}}
    done = call_here("run", runs.write(strategy, **changes))
    assert done.returncode == 0, done.stderr
    best = runs.best(strategy)
    assert 0.995 * best["budget_bytes"] <= best["winner"]["file_bytes"] <= best["budget_bytes"]
