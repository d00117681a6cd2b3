"""Running block by block is running the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder, ModelFolderError, resolve_model
from evaluators.model.outline import attention_of
from tests.conftest import EMBEDDED
from tests.small_models import CONFIGS, save_small_model

CPU = torch.device("cpu")


IDS = torch.randint(0, 500, (3, 40), generator=torch.Generator().manual_seed(0))
ROPE = {"rope_theta": 10000.0}
LLAMA3 = {**ROPE, "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {**ROPE, "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
LONG |= {"original_max_position_embeddings": 16, "partial_rotary_factor": 1.0}
MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LOCAL_GLOBAL = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
}
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "linear rope", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}}),
    ("llama", "llama3 rope", {"rope_parameters": LLAMA3}),
    ("llama", "yarn rope", {"rope_parameters": YARN}),
    (
        "llama",
        "dynamic rope",
        {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16},
    ),
    ("mistral", "window", {"sliding_window": 8}),
    ("mistral", "window as long as the text", {"sliding_window": 40}),
    ("qwen2", "window of some blocks", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}),
    ("qwen2", "layer types", {"use_sliding_window": True, **MIXED}),
    ("qwen3", "layer types, yarn rope", {"use_sliding_window": True, **MIXED, "rope_parameters": YARN}),
    ("gemma2", "window", {"sliding_window": 8}),
    ("gemma2", "strong caps", {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.5}),
    ("gemma2", "no caps", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma3_text", "layer types", {**MIXED, "rope_parameters": LOCAL_GLOBAL}),
    ("gemma3_text", "cap", {**MIXED, "final_logit_softcapping": 0.5}),
    ("gemma3_text", "bidirectional", {**MIXED, "use_bidirectional_attention": True}),
    ("phi3", "window", {"sliding_window": 8}),
    ("phi3", "long rope", {"rope_parameters": LONG, "original_max_position_embeddings": 16}),
    ("phi3", "partial rope", {"rope_parameters": {**ROPE, "rope_type": "default", "partial_rotary_factor": 0.5}}),
]


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(ids).logits


def logits_by_blocks(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = BlockModel(ModelFolder(folder), CPU)
    model.load_all()
    with torch.inference_mode():
        return model.head(model.run_from(0, model.embed(ids)))


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_blocks_give_exactly_the_logits_of_transformers(model_type: str, tied: bool, tmp_path: Path) -> None:
    folder = save_small_model(tmp_path, model_type, tie_word_embeddings=tied, tokenizer=False)
    assert torch.equal(logits_by_blocks(folder, IDS), logits_of(folder, IDS))


@pytest.mark.parametrize("padding", [500, -1, 9999])
def test_a_padding_token_does_not_matter(padding: int, tmp_path: Path) -> None:
    folder = ModelFolder(save_small_model(tmp_path, "llama", tokenizer=False))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token_id": padding}))
    model = BlockModel(folder, CPU)
    rows = folder.read(model.embedding_name)[:4]
    model.place(model.embedding_name, rows)  # as the sweep does, with the rows in use
    assert torch.equal(model.embed(torch.tensor([[3, 0]])), rows[[3, 0]][None])


@pytest.mark.parametrize(("model_type", "name", "settings"), VARIANTS, ids=[f"{v[0]}-{v[1]}" for v in VARIANTS])
def test_windows_ropes_and_caps_are_those_of_transformers(
    model_type: str, name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_small_model(tmp_path / "variant", model_type, tokenizer=False, **settings)
    ours = logits_by_blocks(folder, IDS)
    assert torch.equal(ours, logits_of(folder, IDS))
    if name != "window as long as the text":
        plain = save_small_model(tmp_path / "plain", model_type, tokenizer=False)
        assert not torch.allclose(ours, logits_of(plain, IDS), atol=1e-3)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_blocks_that_multiply_in_bfloat16_stay_near_and_keep_hidden_states_in_float32(
    model_type: str, tmp_path: Path
) -> None:
    folder = ModelFolder(save_small_model(tmp_path, model_type, tokenizer=False))
    exact, rounded = BlockModel(folder, CPU), BlockModel(folder, CPU, torch.bfloat16)
    with torch.inference_mode():
        for model in (exact, rounded):
            model.load_all()
        expected, found = (model.run_from(0, model.embed(IDS)) for model in (exact, rounded))
    assert found.dtype == torch.float32
    assert 1e-5 < float((found - expected).norm() / expected.norm()) < 3e-2


def test_lengths_asked_before_change_nothing(tmp_path: Path) -> None:
    """Dynamic frequencies grow with the longest text seen; masks have the text's length."""
    dynamic = {**ROPE, "rope_type": "dynamic", "factor": 4.0}
    folder = save_small_model(
        tmp_path, "mistral", tokenizer=False, rope_parameters=dynamic, max_position_embeddings=16, sliding_window=8
    )
    model = BlockModel(ModelFolder(folder), CPU)
    model.load_all()
    with torch.inference_mode():
        for length in (40, 24):
            ids = IDS[:, :length]
            assert torch.equal(model.head(model.run_from(0, model.embed(ids))), logits_of(folder, ids))


def test_gradients_pass_after_a_text_was_only_measured(tmp_path: Path) -> None:
    model = BlockModel(ModelFolder(save_small_model(tmp_path, "gemma2", tokenizer=False, sliding_window=8)), CPU)
    model.load_all()
    with torch.inference_mode():
        model.run_from(0, model.embed(IDS))
    norm = model.weight("model.layers.0.input_layernorm.weight").requires_grad_(True)
    model.run_from(0, model.embed(IDS)).square().sum().backward()  # type: ignore[no-untyped-call]
    assert norm.grad is not None and bool(norm.grad.abs().sum() > 0)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_attention_is_what_transformers_takes_by_default(model_type: str, tmp_path: Path) -> None:
    config = CONFIGS[model_type](num_hidden_layers=1, vocab_size=8, pad_token_id=0)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.config._attn_implementation == attention_of(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "sentence"),
    [
        ("t5", "expected a model that transformers can build from"),
        ("", "expected a model that transformers can build from"),
    ],
)
def test_a_model_that_does_not_run_by_blocks_is_refused_in_one_sentence(
    model_type: str, sentence: str, tmp_path: Path
) -> None:
    folder = save_small_model(tmp_path, "llama", tokenizer=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    with pytest.raises(ModelFolderError, match=sentence):
        BlockModel(ModelFolder(folder), CPU)


def test_an_unloaded_block_takes_no_memory() -> None:
    model = BlockModel(ModelFolder(EMBEDDED), CPU)
    assert all(parameter.is_meta for parameter in model.model.parameters())
    model.load_block(2)
    loaded = {name for name, parameter in model.model.named_parameters() if not parameter.is_meta}
    assert loaded and all(name.startswith("model.layers.2.") for name in loaded)
    model.unload_block(2)
    assert all(parameter.is_meta for parameter in model.model.parameters())


def test_every_tensor_belongs_to_a_block() -> None:
    model = BlockModel(ModelFolder(EMBEDDED), CPU)
    assert model.block_of("model.embed_tokens.weight") == -1
    assert model.block_of("model.layers.5.mlp.down_proj.weight") == 5
    assert model.block_of("model.norm.weight") == 6


def test_a_missing_folder_a_missing_file_and_broken_weights_are_each_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="expected a Hugging Face model folder or id, found no folder at ./none"):
        resolve_model("./none")
    with pytest.raises(ModelFolderError, match=r"expected config.json in the model folder, found none"):
        ModelFolder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelFolderError, match=r"expected \*.safetensors weights in .*save_pretrained"):
        ModelFolder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((EMBEDDED / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ModelFolderError, match="expected a readable safetensors file"):
        ModelFolder(tmp_path)
