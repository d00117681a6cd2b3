"""Calibration and evaluation of architectures beyond Llama's: fused projections, windows, capped logits."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from evaluators.data.windows import TokenWindows
from evaluators.engine.evaluator import EvaluatorSetup, GenomeEvaluator
from evaluators.model.folder import ModelFolder
from evaluators.prepare.bank import Bank, BuildBankGroup
from evaluators.prepare.calibration import Calibrate
from evaluators.prepare.input_group import InputGroup, group_file
from quantizers.settings import CompensationSettings
from search.fitness import FitnessSettings
from search.types import Fidelity, SearchSpace
from tests.small_models import save_small_model

MODELS: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 8, "final_logit_softcapping": 1.0},
    "phi3": {"sliding_window": 8, "tie_word_embeddings": False},
}
QUANTIZED = {  # input groups
    "gemma2": ("model.embed_tokens", "model.layers.1.mlp.gate_proj"),
    "phi3": ("lm_head", "model.layers.1.self_attn.qkv_proj"),
}
IDS = torch.randint(0, 500, (8, 32), generator=torch.Generator().manual_seed(0))
FIDELITY = Fidelity("search", IDS.numel())


@pytest.fixture(scope="module", params=MODELS)
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EvaluatorSetup:
    """A calibrated small model with a bank of two of its tensors, the head among them."""
    path = tmp_path_factory.mktemp(request.param)
    model = save_small_model(path / "model", request.param, tokenizer=False, **MODELS[request.param])
    windows = path / "windows.safetensors"
    windows.write_bytes(TokenWindows({"calibration": IDS.numpy(), "search": IDS.numpy()}, "").to_bytes())
    Calibrate(model, windows, path).run({})
    names = [f"{name}.weight" for name in QUANTIZED[request.param]]
    space = SearchSpace.per_tensor({name: ModelFolder(model).shapes[name] for name in names}, ("W4", "W8"), 0)
    formats = {gene.name: tuple(f.name for f in gene.formats) for gene in space.genes}
    for group in QUANTIZED[request.param]:
        BuildBankGroup(model, group_file(path, group), path, formats, CompensationSettings()).run({})
    return EvaluatorSetup(model, path, windows, space, FitnessSettings(), "key")


def test_hessians_equal_those_of_transformers_own_forward(setup: EvaluatorSetup) -> None:
    model = AutoModelForCausalLM.from_pretrained(setup.model, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    name = setup.space.genes[1].name.removesuffix(".weight")
    model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        model(IDS)
    x = seen[0].flatten(0, 1).double()
    expected = x.T @ x / len(x)
    found = InputGroup.load(group_file(setup.bank, name)).hessian.double()
    assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("genome", [(0, 1), (1, 0)])
def test_an_evaluation_equals_transformers_own_forward_of_the_decoded_weights(
    setup: EvaluatorSetup, genome: tuple[int, int]
) -> None:
    full, quantized = (AutoModelForCausalLM.from_pretrained(setup.model, dtype=torch.float32) for _ in range(2))
    for name, fmt in setup.space.formats_of(genome).items():
        parameter = quantized.get_parameter(name)
        parameter.data = Bank(setup.bank).weights(name, fmt, parameter.shape[1], torch.device("cpu"))
    with torch.inference_mode():
        p, q = (model(IDS).logits.double() for model in (full, quantized))
    (found,) = GenomeEvaluator(setup).evaluate([genome], FIDELITY)
    assert found.logit_mse == pytest.approx(float((p - q).square().mean()), rel=1e-4)
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found.perplexity == pytest.approx(float((-q[:, :-1].gather(2, IDS[:, 1:, None])).mean().exp()), rel=1e-5)
