"""What is predicted of memory, what `bitgenome plan` says of it, and what it refuses."""

from pathlib import Path

import pytest
import torch

from bitgenome.common.errors import UserError
from bitgenome.config.run import load_config
from bitgenome.plan.memory import check_memory, healing_variant, memory_line, proof_memory, stage_memory
from bitgenome.plan.plan import Plan, make_plan
from evaluators.engine.memory import Load, sweep_memory
from evaluators.gradient.memory import gradient_memory
from evaluators.healing.memory import healing_memory
from evaluators.model.sizes import ModelShape
from evaluators.prepare.memory import bank_memory, calibration_memory
from evaluators.settings import HealingSettings
from quantizers.formats.table import legal_formats
from tests.conftest import REPOSITORY

CONFIG = REPOSITORY / "configs" / "stdlib-6m.yaml"
LITTLE = [f"text.tokens.{split}=512" for split in ("sensitivity", "search", "validation", "test")]


def test_a_plan_tells_resident_from_streamed() -> None:
    assert memory_line(make_plan(load_config(CONFIG, ["evaluation.memory=2GiB"]))).endswith("resident")
    streamed = memory_line(make_plan(load_config(CONFIG, ["evaluation.memory=250 MiB"])))
    assert streamed.endswith("streamed, 0.15 GiB of weights in all formats")


def test_memory_that_cannot_hold_a_block_is_refused_with_what_would_do() -> None:
    plan = make_plan(load_config(CONFIG, ["evaluation.memory=100 MiB"]))
    with pytest.raises(UserError, match=r"expected at least 0\.\d+ GiB of memory for a worker.*found 0\.10 GiB: use"):
        check_memory(plan)


@pytest.mark.parametrize("size", ["-1", "a lot", "0"])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    with pytest.raises(UserError, match="evaluation.memory"):
        load_config(CONFIG, [f"evaluation.memory={size}"])


def test_memory_does_not_decide_the_result(tmp_path: Path) -> None:
    digests = {load_config(CONFIG, overrides).digest for overrides in ([], ["evaluation.memory=1GiB"])}
    assert len(digests) == 1


def llama_8b() -> ModelShape:
    """The sizes of Llama-3.1-8B."""
    D, inner, vocabulary = 4096, 14336, 128256
    block = {
        **dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (D, D)),
        **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (1024, D)),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (inner, D)),
        "mlp.down_proj": (D, inner),
        **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (D,)),
    }
    tensors: dict[str, tuple[int, ...]] = {
        f"model.layers.{layer}.{name}.weight": shape for layer in range(32) for name, shape in block.items()
    }
    ends = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocabulary, D))
    return ModelShape(
        32, D, inner, 32, tensors | ends | {"model.norm.weight": (D,)}, *reversed(ends), eager=False, stored=2
    )


def test_an_8b_ends_on_24_gib_of_device_and_64_of_host() -> None:
    shape, gpu, gib = llama_8b(), torch.device("cuda"), 1 << 30
    assert sum(map(shape.weights, shape.tensors)) == 8_030_261_248
    limit, tokens = int(0.9 * 24 * gib), {"calibration": 98304, "validation": 16384, "test": 16384}
    formats = {name: legal_formats(("W2", "W4"), s[1]) for name, s in shape.tensors.items() if len(s) == 2}
    stages = {
        "calibration": calibration_memory(shape, tokens["calibration"], 512, gpu),
        "bank": bank_memory(shape, formats, gpu),
        "gradient": gradient_memory(shape, 4096, 512, gpu),
        "search": sweep_memory(shape, formats, 512, Load(48, 8192, 4), limit, torch.bfloat16, gpu).stage(gpu),
        "healing": healing_memory(shape, "blockwise", HealingSettings(), 512, tokens, gpu),
        "proof": proof_memory(shape, 512, tokens["test"], limit, gpu, q8=True),
    }
    for name, found in stages.items():
        assert 2 * gib < found.device_bytes <= limit and found.host_bytes < 0.7 * 64 * gib, name
    whole = healing_memory(shape, "full", HealingSettings(), 512, tokens, gpu)
    assert whole.device_bytes > 8 * sum(map(shape.weights, shape.tensors)) > limit
    assert shape.block_bytes(torch.bfloat16) == pytest.approx(shape.block_bytes() / 2, rel=1e-4)


def test_healing_is_of_the_whole_model_only_where_that_fits() -> None:
    def plan(*overrides: str) -> Plan:
        return make_plan(load_config(CONFIG, list(overrides)))

    assert healing_variant(plan("evaluation.memory=2GiB")) == "full"
    assert healing_variant(plan("evaluation.memory=100MiB")) == "blockwise"
    assert healing_variant(plan("evaluation.memory=2GiB", "healing.variant=blockwise")) == "blockwise"
    stages = stage_memory(plan("evaluation.memory=400MiB"), torch.device("cpu"))
    assert all(0 < found.host_bytes <= 420 << 20 and not found.device for found in stages.values())
    refused = plan("evaluation.memory=125MiB", "healing.variant=full", *LITTLE)
    with pytest.raises(UserError, match=r"expected 0\.\d+ GiB of memory for a worker with healing.variant: full.*auto"):
        check_memory(refused)
