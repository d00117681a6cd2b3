"""Running block by block is running the model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from evaluators.block_model import BlockModel
from evaluators.model_folder import ModelFolder, ModelFolderError, resolve_model
from tests.conftest import EMBEDDED
from tests.small_models import CONFIGS, save_small_model

CPU = torch.device("cpu")


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(ids).logits


def logits_by_blocks(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = BlockModel(ModelFolder(folder), CPU)
    model.load_all()
    with torch.inference_mode():
        return model.run_from(0, model.embed(ids)) @ model.head_weight.T


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_blocks_give_exactly_the_logits_of_transformers(model_type: str, tied: bool, tmp_path: Path) -> None:
    folder = save_small_model(tmp_path, model_type, tie_word_embeddings=tied)
    ids = torch.randint(0, 500, (3, 40), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits_by_blocks(folder, ids), logits_of(folder, ids))


def test_a_sliding_window_shorter_than_the_text_is_honoured(tmp_path: Path) -> None:
    folder = save_small_model(tmp_path, "mistral", sliding_window=8)
    ids = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    ours, full = logits_by_blocks(folder, ids), logits_of(folder, ids)
    assert torch.allclose(ours, full, atol=1e-5)
    unlimited = save_small_model(tmp_path / "full", "mistral", sliding_window=None)
    assert not torch.allclose(ours, logits_of(unlimited, ids), atol=1e-3)


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
    with pytest.raises(ModelFolderError, match=r"expected \*.safetensors weights, .*save_pretrained"):
        ModelFolder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((EMBEDDED / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ModelFolderError, match="expected a readable safetensors file"):
        ModelFolder(tmp_path)
