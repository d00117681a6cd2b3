"""Mixtures of experts, and rotary frequencies: what llama.cpp's converter does to a model is undone.

The files here are written as the converter writes them (conversion/gpt_oss.py, conversion/llama.py of llama.cpp).
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from exporters.metadata.rope import Rope, frequency_factors
from exporters.opening.configuration import configuration
from exporters.opening.rotary import FACTORS, llama3_scaling
from exporters.opening.source import read_model
from exporters.opening.weights import opened_tensors

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 3, "num_experts_per_tok": 2,
    "max_position_embeddings": 64, "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
NAMES = {  # of a block's tensors that are stored as they are
    "input_layernorm.weight": "attn_norm.weight", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.router": "ffn_gate_inp", "mlp.gate.weight": "ffn_gate_inp.weight", "self_attn.sinks": "attn_sinks.weight",
    "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
}  # fmt: skip


def gpt_oss_file(name: str, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a file that hold one of a block, whose gate and up take turns."""
    if name.startswith("mlp.experts.gate_up_proj"):
        kind = "bias" if name.endswith("bias") else "weight"
        turned = value if kind == "bias" else value.swapaxes(1, 2)
        yield f"ffn_gate_exps.{kind}", turned[:, ::2]
        yield f"ffn_up_exps.{kind}", turned[:, 1::2]
    elif name == "mlp.experts.down_proj":
        yield "ffn_down_exps.weight", value.swapaxes(1, 2)
    else:
        yield from stored_as_is(name, value, "post_attention_norm")


def mixtral_file(name: str, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a file that hold one of a block, with the rows of q and k permuted."""
    if name == "mlp.experts.gate_up_proj":
        yield from zip(("ffn_gate_exps.weight", "ffn_up_exps.weight"), np.split(value, 2, axis=1), strict=True)
    elif name == "mlp.experts.down_proj":
        yield "ffn_down_exps.weight", value
    elif name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
        heads = len(value) // SIZES["head_dim"]  # type: ignore[operator]
        rows = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        yield f"attn_{name[10]}.weight", rows
    else:
        yield from stored_as_is(name, value, "ffn_norm")


def stored_as_is(name: str, value: np.ndarray, second_norm: str) -> Iterator[tuple[str, np.ndarray]]:
    names = {**NAMES, "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"}
    names["post_attention_layernorm.weight"] = f"{second_norm}.weight"
    ours = next(ours for ours in names if name.startswith(ours))
    yield names[ours] + name.removeprefix(ours), value


@pytest.mark.parametrize(
    ("kind", "architecture", "stored"), [("gpt_oss", "gpt-oss", gpt_oss_file), ("mixtral", "llama", mixtral_file)]
)
def test_experts_are_those_of_the_model_that_the_file_was_made_from(
    kind: str, architecture: str, stored: Any, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(kind, **SIZES)
    torch.manual_seed(0)
    state = AutoModelForCausalLM.from_config(config, trust_remote_code=False).state_dict()
    state = {name: torch.randn(tensor.shape) for name, tensor in state.items()}
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(3)
    writer.add_expert_used_count(2)
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in state.items():
        if name.startswith("model.layers."):
            block, _, rest = name.removeprefix("model.layers.").partition(".")
            for part, value in stored(rest, tensor.numpy()):
                writer.add_tensor(f"blk.{block}.{part}", np.ascontiguousarray(value))
        else:
            writer.add_tensor(f"{ends[name.removesuffix('.weight')]}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = read_model(tmp_path / "model.gguf")
    found = configuration(model)
    assert found.model_type == kind and {name: getattr(found, name) for name in SIZES} == SIZES
    tensors = {tensor.name: tensor for tensor in opened_tensors(model, found)}
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name].read(), state[name]) for name in state)


@pytest.mark.parametrize(
    ("theta", "head_dim", "factor", "original"),
    [(500000.0, 128, 8.0, 8192), (500000.0, 64, 32.0, 8192), (10000.0, 16, 4.0, 128), (10000.0, 32, 8.0, 100)],
)
def test_llama3_scaling_is_found_from_the_frequencies(
    theta: float, head_dim: int, factor: float, original: int
) -> None:
    parameters = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    parameters["original_max_position_embeddings"] = original
    divisors = frequency_factors(Rope(theta, "llama3", parameters), head_dim)
    model: Any = SimpleNamespace(floats=lambda name: {FACTORS: divisors}[name], path=Path("model.gguf"))
    found = llama3_scaling(model, theta, head_dim)
    rope = Rope(theta, "llama3", {name: value for name, value in found.items() if name != "rope_type"})
    assert found["rope_type"] == "llama3"
    np.testing.assert_allclose(frequency_factors(rope, head_dim), divisors, rtol=1e-5)
    if head_dim > 32:  # published models, with several frequencies between
        assert found == {"rope_type": "llama3", **parameters}
