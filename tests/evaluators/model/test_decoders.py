"""Any decoder of transformers runs block by block, and its parameters come from whatever its files hold."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from evaluators.engine.batches import Batches
from evaluators.engine.prefix_cache import PrefixCache
from evaluators.engine.sweep import Candidate, Sweep
from evaluators.engine.weights import ModelWeights
from evaluators.model.block_model import BlockModel
from evaluators.model.checks import check_model
from evaluators.model.experts import Experts
from evaluators.model.folder import ModelFolder, ModelFolderError
from evaluators.model.sizes import ModelShape
from quantizers.formats.packed_tensor import dequantize
from quantizers.formats.table import FORMATS
from quantizers.rounding.nearest import quantize
from tests.evaluators.model.test_experts import Rounded

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
SMALL = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {  # one model type for each kind of decoder
    "gpt_oss": EXPERTS,  # sinks, transposed experts
    "qwen3_moe": EXPERTS,  # experts that files hold one by one
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 5.0, "residual_multiplier": 0.5},
    "cohere2": {"logit_scale": 0.25, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 32},  # embedding_norm
    "qwen3_5_text": LINEAR,
    "gemma4_text": {  # an input of its own for each block; the last two attend to keys of the first two
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "global_head_dim": 32,
        "vocab_size_per_layer_input": 64, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 4, "num_experts": None, "moe_intermediate_size": None,
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},  # positions are looked up, other names
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8},  # tuples
}  # fmt: skip
LONG: dict[str, dict[str, Any]] = {
    "mixtral": EXPERTS, "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32}, "granitemoe": EXPERTS,
    "phimoe": EXPERTS, "olmoe": EXPERTS, "qwen3_next": EXPERTS | LINEAR, "qwen3_5_moe_text": EXPERTS | LINEAR,
    "olmo2": {}, "smollm3": {}, "glm4": {}, "exaone4": {}, "ministral3": {}, "gemma": {}, "bloom": {}, "stablelm": {},
    "starcoder2": {}, "phi": {}, "olmo": {}, "nemotron": {}, "arcee": {}, "cohere": {},
}  # fmt: skip


def save(path: Path, model_type: str, settings: dict[str, Any]) -> PreTrainedModel:
    """Write a small random model; its norms, biases and buffers are random too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SMALL | settings), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    model.save_pretrained(path)
    return model


def close(found: torch.Tensor, expected: torch.Tensor, model: BlockModel) -> None:
    """Assert that logits are the same bits; near, where experts run apart, which transformers multiplies together."""
    if any(isinstance(module, Experts) for module in model.model.modules()):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("model_type", [*KINDS, *(pytest.param(kind, marks=pytest.mark.long) for kind in LONG)])
def test_blocks_give_exactly_the_logits_of_transformers(model_type: str, tmp_path: Path) -> None:
    save(tmp_path, model_type, (KINDS | LONG)[model_type])
    folder = ModelFolder(tmp_path)
    check_model(folder)
    model = BlockModel(folder, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.model.parameters())
    model.load_all()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        found = model.head(model.run_from(0, model.embed(IDS)))
        close(found, expected(IDS).logits, model)
    shape = ModelShape.of(folder)
    assert (shape.layers, shape.hidden, shape.vocabulary) == (len(model.blocks), 64, 64)
    assert shape.state_bytes == 4 * model.state_width
    assert shape.block_bytes() > 0 and shape.activation_bytes(12) > 0


def test_layers_that_hold_their_weight_transposed_are_linear_layers(tmp_path: Path) -> None:
    stored = save(tmp_path, "gpt2", KINDS["gpt2"])
    folder = ModelFolder(tmp_path)
    found = dict(BlockModel(folder, torch.device("cpu")).linears(1))
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert list(found) == [f"transformer.h.1.{name}.weight" for name in names]
    for name in found:
        assert folder.shapes[name] == tuple(folder.read(name).shape)
        assert torch.equal(folder.read(name), stored.get_parameter(name).T)


@pytest.mark.parametrize("model_type", ["gemma4_text", "granite"])
def test_the_gradient_at_the_looked_up_rows_is_that_of_transformers(model_type: str, tmp_path: Path) -> None:
    save(tmp_path, model_type, KINDS[model_type] | {"tie_word_embeddings": False})
    model = BlockModel(ModelFolder(tmp_path), torch.device("cpu"))
    model.load_all()
    state = model.embed(IDS).requires_grad_(True)
    model.run_from(0, state).square().sum().backward()  # type: ignore[no-untyped-call]
    assert state.grad is not None
    gradients = model.lookup_gradients(IDS, state.grad)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected.get_decoder()(IDS).last_hidden_state.square().sum().backward()
    assert len(gradients) == (2 if model_type == "gemma4_text" else 1)
    for name, rows in gradients.items():
        weight = expected.get_parameter(name)
        found = torch.zeros_like(weight).index_add_(0, IDS.flatten(), rows.flatten(0, 1))
        torch.testing.assert_close(found, weight.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model_type", ["gemma4_text", "qwen3_5_text", "phi", "bamba"])
@torch.inference_mode()
def test_a_sweep_equals_a_plain_forward_of_every_candidate(model_type: str, tmp_path: Path) -> None:
    save(tmp_path, model_type, (KINDS | LONG)[model_type])
    folder = ModelFolder(tmp_path)
    model = BlockModel(folder, torch.device("cpu"))
    q4 = FORMATS["Q4_0"]
    names = [name for block in range(len(model.blocks)) for name, _ in model.linears(block)]
    names = [*model.lookup_names, *(name for name in names if folder.shapes[name][1] % 32 == 0)]
    candidates: list[Candidate] = [{}, dict.fromkeys(names, q4), dict.fromkeys(names[1:], q4)]
    candidates += [dict.fromkeys(names[2::3], q4), dict.fromkeys(names[3::2], q4), {names[-1]: q4}]
    candidates += [{name: q4} for name in names if ".layers.1.mlp." in name]  # attention as without it
    sweep = Sweep(ModelWeights(model, Rounded(folder), 1 << 24), Batches(1), PrefixCache(1 << 20))
    for _ in range(2):  # the second time from the cache
        swept = sweep.final_states(IDS, "text", candidates, candidates[:4])
    head = sweep.head(None)(swept[0])
    sweep.close()
    for candidate, states in zip(candidates, swept, strict=True):
        plain = BlockModel(folder, torch.device("cpu"))
        plain.load_all()
        for name, fmt in candidate.items():
            plain.weight(name).data = dequantize(fmt, quantize(fmt, folder.read(name)))
        expected = plain.run_from(0, plain.embed(IDS))
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
        if not candidate:
            torch.testing.assert_close(head, plain.head(expected), rtol=1e-4, atol=1e-5)


MULTIMODAL: dict[str, dict[str, Any]] = {"gemma3": {}, "mistral3": {}, "qwen3_5_moe": EXPERTS | LINEAR}


@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_of_a_multimodal_model_the_text_part_runs(model_type: str, tmp_path: Path) -> None:
    text = AutoConfig.for_model(model_type).text_config.model_type
    config = AutoConfig.for_model(model_type, text_config={**SMALL, **MULTIMODAL[model_type], "model_type": text})
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "depth", "num_heads", "num_attention_heads"):
        if hasattr(config.vision_config, name):
            setattr(config.vision_config, name, 32 if name.endswith("size") else 2)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    folder = ModelFolder(tmp_path)
    check_model(folder)
    model = BlockModel(folder, torch.device("cpu"))
    model.load_all()
    expected = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        close(model.head(model.run_from(0, model.embed(IDS))), expected(input_ids=IDS).logits, model)
    assert ModelShape.of(folder).layers == 2
    assert not any("vision" in name for name in folder.shapes)


def test_experts_are_those_of_the_stacked_parameters(tmp_path: Path) -> None:
    model = save(tmp_path, "qwen3_moe", EXPERTS)
    folder = ModelFolder(tmp_path)
    prefix = "model.layers.1.mlp.experts"
    gate, up = model.get_parameter(f"{prefix}.gate_up_proj")[2].chunk(2)
    down = model.get_parameter(f"{prefix}.down_proj")[2]
    for kind, expected in {"gate_proj": gate, "up_proj": up, "down_proj": down}.items():
        assert torch.equal(folder.read(f"{prefix}.2.{kind}.weight"), expected)


def test_an_expert_that_is_missing_is_one_sentence(tmp_path: Path) -> None:
    save(tmp_path, "qwen3_moe", EXPERTS)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelFolderError, match=r"7 tensors of model.layers.1.mlp.experts.gate_up_proj .* to fit"):
        check_model(ModelFolder(tmp_path))
