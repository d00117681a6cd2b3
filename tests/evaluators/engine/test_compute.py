"""Blocks that multiply in 16 bits measure what float32 does, up to a floor that is known."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitgenome.common.devices import compute_type
from bitgenome.common.errors import UserError
from evaluators.data.windows import TokenWindows
from evaluators.engine.compute_floor import MeasureComputeFloor, compute_floor
from evaluators.engine.evaluator import EvaluatorSetup, GenomeEvaluator
from search.fitness import FitnessSettings
from search.types import Fidelity, SearchSpace
from tests.conftest import EMBEDDED, SmallBank
from tests.small_models import save_small_model

CPU = torch.device("cpu")
FIDELITY = Fidelity("search", 1024)


@pytest.fixture(scope="module")
def setup(small_bank: SmallBank) -> EvaluatorSetup:
    return replace(small_bank.setup(), compute="bfloat16", key="bfloat16")


@pytest.fixture(scope="module")
def evaluator(setup: EvaluatorSetup) -> GenomeEvaluator:
    return GenomeEvaluator(setup)


@pytest.fixture(scope="module")
def exact(setup: EvaluatorSetup) -> GenomeEvaluator:
    return GenomeEvaluator(setup.in_float32)


def genomes(setup: EvaluatorSetup, count: int) -> list[tuple[int, ...]]:
    rng = random.Random(5)
    return [tuple(rng.randrange(len(g.formats)) for g in setup.space.genes) for _ in range(count)]


def test_auto_is_float32_on_a_cpu_and_a_named_type_is_itself() -> None:
    assert compute_type("auto", CPU) == torch.float32
    assert compute_type("bfloat16", CPU) == torch.bfloat16


def test_a_worker_that_would_emulate_the_type_of_its_run_says_so(setup: EvaluatorSetup) -> None:
    with pytest.raises(UserError, match="expected workers whose device multiplies in bfloat16.*found a worker on cpu"):
        GenomeEvaluator(replace(setup, chosen=True))
    GenomeEvaluator(replace(setup, chosen=True).in_float32)


def test_only_what_blocks_multiply_is_rounded(evaluator: GenomeEvaluator) -> None:
    model, weights = evaluator.sweep.model, evaluator.sweep.weights
    types = {name: weights.get(name, None).dtype for name in model.folder.shapes}
    rounded = {name for name, dtype in types.items() if dtype == torch.bfloat16}
    assert rounded == {name for name in types if name.endswith("_proj.weight")}
    assert set(types.values()) == {torch.bfloat16, torch.float32}
    (states,) = evaluator.sweep.final_states(evaluator.ids(FIDELITY), FIDELITY, [{}])
    assert states.dtype == torch.float32


def test_divergences_differ_from_float32_by_rounding_alone(evaluator: GenomeEvaluator, exact: GenomeEvaluator) -> None:
    chosen = genomes(evaluator.setup, 3)
    found, expected = (e.evaluate(chosen, FIDELITY) for e in (evaluator, exact))
    for ours, true in zip(found, expected, strict=True):
        assert ours.kl != true.kl
        assert ours.kl == pytest.approx(true.kl, rel=0.03)
        assert ours.perplexity == pytest.approx(true.perplexity, rel=0.01)


def test_results_do_not_depend_on_what_is_evaluated_together(setup: EvaluatorSetup, evaluator: GenomeEvaluator) -> None:
    chosen = genomes(setup, 3)
    alone = [evaluator.evaluate([genome], FIDELITY)[0].kl for genome in chosen]
    assert [e.kl for e in evaluator.evaluate(chosen, FIDELITY)] == alone
    assert [e.kl for e in GenomeEvaluator(setup).evaluate(chosen[::-1], FIDELITY)] == alone[::-1]


def test_the_floor_is_the_divergence_from_a_plain_float32_forward(
    setup: EvaluatorSetup, evaluator: GenomeEvaluator
) -> None:
    floor = MeasureComputeFloor(setup, FIDELITY).run({})
    assert floor is not None and (floor.compute, floor.tokens) == ("bfloat16", 512)
    ids = evaluator.ids(FIDELITY)[:2]
    (states,) = evaluator.sweep.final_states(ids, "floor", [{}])
    with torch.inference_mode():
        p = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)(ids).logits
        q = evaluator.sweep.head(None)(states)
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    assert floor.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-2)
    assert 1e-7 < floor.kl < 1e-3


def test_float32_has_no_floor(exact: GenomeEvaluator) -> None:
    assert compute_floor(exact, FIDELITY) is None


def test_activations_beyond_float16_have_an_infinite_floor(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "model", "llama", tokenizer=False)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= 1e5
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    windows = tmp_path / "windows.safetensors"
    windows.write_bytes(TokenWindows({"search": torch.arange(64).reshape(2, 32).numpy()}, "").to_bytes())
    setup = EvaluatorSetup(model, tmp_path, windows, SearchSpace((), 0), FitnessSettings(), "", compute="float16")
    floors = [
        MeasureComputeFloor(s, Fidelity("search", 64)).run({}) for s in (setup, replace(setup, compute="bfloat16"))
    ]
    assert [f is not None and math.isfinite(f.kl) for f in floors] == [False, True]


def test_eight_bit_inputs_and_sixteen_bit_products_go_together(setup: EvaluatorSetup) -> None:
    chosen = genomes(setup, 1)
    q8 = replace(setup, activations="q8", key="q8")
    ours, true = (GenomeEvaluator(s).evaluate(chosen, FIDELITY)[0].kl for s in (q8, q8.in_float32))
    assert ours == pytest.approx(true, rel=0.03)
