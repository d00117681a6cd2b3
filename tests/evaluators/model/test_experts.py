"""Experts that are taken apart compute what transformers' stacked ones do, and each is a tensor like any other."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from evaluators.engine.batches import Batches
from evaluators.engine.prefix_cache import PrefixCache
from evaluators.engine.sweep import Candidate, Sweep
from evaluators.engine.weights import ModelWeights
from evaluators.model.block_model import BlockModel
from evaluators.model.checks import check_model
from evaluators.model.experts import Experts, expert_parts
from evaluators.model.folder import ModelFolder
from evaluators.prepare.calibration import calibrate
from evaluators.prepare.input_group import InputGroup
from quantizers.formats.packed_tensor import dequantize
from quantizers.formats.table import FORMATS, QuantFormat
from quantizers.rounding.nearest import quantize
from tests.small_models import MIXTURES, save_small_model

CPU = torch.device("cpu")
EXPERTS = 4
SETTINGS = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}


def stacked(kind: str) -> nn.Module:
    """Random experts of hidden size 16 and inner size 8, as transformers stacks them."""
    sizes = {"hidden_size": 16, "intermediate_size": 8, "moe_intermediate_size": 8, "head_dim": 8}
    made: dict[str, tuple[type, type, dict[str, int]]] = {
        "concatenated": (Qwen3MoeExperts, Qwen3MoeConfig, {"num_experts": EXPERTS}),
        "interleaved, transposed, biased": (GptOssExperts, GptOssConfig, {"num_local_experts": EXPERTS}),
        "without gate": (NemotronHExperts, NemotronHConfig, {"n_routed_experts": EXPERTS}),
    }
    kind_of, config_of, more = made[kind]
    config = config_of(**sizes, **more)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    module = kind_of(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return module


def fill(experts: Experts, module: nn.Module) -> None:
    """Copy the weights of stacked experts to those that are apart."""

    def matrices(name: str) -> Tensor:
        weight = module.get_parameter(name)
        return weight.mT if module.is_transposed else weight

    for index, expert in enumerate(experts):
        expert.down_proj.weight.data = matrices("down_proj")[index]
        if not module.has_gate:
            expert.up_proj.weight.data = matrices("up_proj")[index]
            continue
        both, halves = matrices("gate_up_proj")[index], (expert.gate_proj, expert.up_proj)
        bias = module.gate_up_proj_bias[index] if module.has_bias else None
        for half, linear in enumerate(halves):
            rows = slice(half * 8, half * 8 + 8) if module.is_concatenated else slice(half, None, 2)
            linear.weight.data = both[rows]
            if bias is not None:
                linear.bias.data = bias[rows]
        if module.has_bias:
            expert.down_proj.bias.data = module.down_proj_bias[index]


@pytest.mark.parametrize("kind", ["concatenated", "interleaved, transposed, biased", "without gate"])
@torch.no_grad()
def test_experts_apart_compute_what_stacked_ones_do(kind: str) -> None:
    module = stacked(kind)
    experts = Experts(module)
    fill(experts, module)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(20, 16, generator=generator)
    chosen = torch.rand(20, EXPERTS - 1, generator=generator).topk(2).indices  # nobody chooses the last
    weights = torch.rand(20, 2, generator=generator)
    torch.testing.assert_close(experts(hidden, chosen, weights), module(hidden, chosen, weights), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(save_small_model(tmp_path_factory.mktemp("mixture"), "qwen3_moe", **SETTINGS))


@pytest.mark.parametrize("model_type", MIXTURES)  # files with experts one by one, by other names, and stacked
def test_a_mixture_runs_block_by_block_as_transformers_runs_it(model_type: str, tmp_path: Path) -> None:
    counts = dict.fromkeys(("num_experts", "num_local_experts"), EXPERTS)
    folder = ModelFolder(save_small_model(tmp_path, model_type, tokenizer=False, **(SETTINGS | counts)))
    model = BlockModel(folder, CPU)
    check_model(folder)
    model.load_all()
    ids = torch.randint(0, 500, (3, 24), generator=torch.Generator().manual_seed(2))
    whole = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(model.run_from(0, model.embed(ids)), whole.model(ids).last_hidden_state)
    linears = [parts for name, _ in model.linears(0) if (parts := expert_parts(name))]
    assert [(parts.expert, parts.kind) for parts in linears[:3]] == [
        (0, "gate_proj.weight"), (0, "up_proj.weight"), (0, "down_proj.weight"),
    ]  # fmt: skip
    assert len(linears) == 3 * EXPERTS


@torch.inference_mode()
def test_a_window_s_outputs_do_not_depend_on_the_windows_beside_it(mixture: ModelFolder) -> None:
    model = BlockModel(mixture, CPU)
    model.load_all()
    ids = torch.randint(0, 500, (7, 40), generator=torch.Generator().manual_seed(5))
    together = model.run_from(0, model.embed(ids))
    for at_once in (1, 3):
        parts = [model.run_from(0, model.embed(part)) for part in ids.split(at_once)]
        assert torch.equal(torch.cat(parts), together)


def groups_of(folder: ModelFolder, tokens: int) -> dict[str, InputGroup]:
    """Input groups of the first block's experts, from a few random tokens."""
    ids = torch.randint(0, 500, (1, tokens), generator=torch.Generator().manual_seed(3))
    found = {group.name: group for group in calibrate(folder, ids, CPU)}
    return {name: group for name, group in found.items() if name.startswith("model.layers.0.mlp.experts.")}


def test_every_expert_has_a_hessian_and_those_with_few_positions_lean_on_the_mean(
    mixture: ModelFolder, caplog: pytest.LogCaptureFixture
) -> None:
    groups = groups_of(mixture, tokens=1)  # reaches two of four experts
    assert sorted(groups) == sorted(
        f"model.layers.0.mlp.experts.{e}.{k}" for e in range(EXPERTS) for k in ("gate_proj", "down_proj")
    )
    gates = [groups[f"model.layers.0.mlp.experts.{expert}.gate_proj"] for expert in range(EXPERTS)]
    assert [len(group.tensors) for group in gates] == [2] * EXPERTS  # gate and up read one input
    powers = torch.stack([group.hessian.trace() for group in gates])
    assert sorted((powers / powers.min()).round().tolist()) == [
        1,
        1,
        2,
        2,
    ]  # shares (1 + 1) / 6, (0 + 1) / 6
    assert "2 of 4 experts" not in caplog.text and "4 of 4 experts read fewer than 16 positions" in caplog.text
    many = groups_of(mixture, tokens=256)
    own = [group.hessian / group.hessian.trace() for name, group in many.items() if name.endswith("gate_proj")]
    assert (own[0] - own[1]).norm() > 0.05 * own[0].norm()  # each its own


class Rounded:
    """Packed tensors of a model, rounded as they are asked for."""

    def __init__(self, folder: ModelFolder):
        self.folder = folder

    def packed(self, tensor: str, fmt: QuantFormat) -> Tensor:
        return quantize(fmt, self.folder.read(tensor))


@torch.inference_mode()
def test_a_sweep_over_experts_equals_a_plain_forward_of_every_candidate(mixture: ModelFolder) -> None:
    q8, q4 = FORMATS["Q8_0"], FORMATS["Q4_0"]
    model = BlockModel(mixture, CPU)
    names = [name for block in range(2) for name, _ in model.linears(block)]
    attention, experts = ([n for n in names if ("experts" in n) == wanted] for wanted in (False, True))
    candidates: list[Candidate] = [{}, dict.fromkeys(names, q4), dict.fromkeys(experts, q4)]
    candidates += [dict.fromkeys(attention, q4), dict.fromkeys(names, q8) | dict.fromkeys(experts[3:9], q4)]
    ids = torch.randint(0, 500, (4, 16), generator=torch.Generator().manual_seed(4))
    sweep = Sweep(ModelWeights(model, Rounded(mixture), 1 << 24), Batches(4), PrefixCache(0))
    swept = sweep.final_states(ids, object(), candidates, [])
    sweep.close()
    for candidate, states in zip(candidates, swept, strict=True):
        plain = BlockModel(mixture, CPU)
        plain.load_all()
        for name, fmt in candidate.items():
            weight = plain.weight(name)
            weight.data = dequantize(fmt, quantize(fmt, mixture.read(name)))
        torch.testing.assert_close(states, plain.run_from(0, plain.embed(ids)))
