"""Small models of every architecture, made once, and the real ones where they are at hand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from evaluators.model.folder import ModelFolder
from quantizers.formats.table import FORMATS, QuantFormat
from tests.small_models import save_small_model

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"
STORIES = SHARED_DATA / "models" / "stories260K"
QWEN_TOKENIZER = SHARED_DATA / "tokenizers" / "qwen2.5"
EMBEDDED = Path(__file__).parents[2] / "models" / "stdlib-6m"


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModelFolder]:
    """Folder of a small random model; equal arguments give the same one."""
    root = tmp_path_factory.mktemp("models")
    made: dict[str, ModelFolder] = {}

    def make(model_type: str, **overrides: object) -> ModelFolder:
        key = repr((model_type, sorted(overrides.items())))
        if key not in made:
            made[key] = ModelFolder(save_small_model(root / str(len(made)), model_type, **overrides))
        return made[key]

    return make


@pytest.fixture(scope="session")
def stories() -> ModelFolder:
    """A trained Llama of 260,032 weights with a SentencePiece-style tokenizer."""
    if not (STORIES / "model.safetensors").is_file():
        pytest.skip("stories260K is not there")
    return ModelFolder(STORIES)


@pytest.fixture(scope="session")
def embedded() -> ModelFolder:
    """The repository's own trained Qwen2."""
    if not (EMBEDDED / "model.safetensors").is_file():
        pytest.skip("models/stdlib-6m has no weights yet")
    return ModelFolder(EMBEDDED)


@torch.inference_mode()
def transformers_hidden(folder: ModelFolder, windows: np.ndarray) -> np.ndarray:
    """Final hidden states (n, T, D) float32 by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32).eval()
    return model.get_decoder()(torch.from_numpy(windows)).last_hidden_state.numpy()


def random_windows(folder: ModelFolder, n: int, length: int, seed: int = 0) -> np.ndarray:
    """Token ids (n, length) int64."""
    return np.random.default_rng(seed).integers(0, folder.config["vocab_size"], (n, length))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def random_bytes(folder: ModelFolder, formats: dict[str, str]) -> dict[str, tuple[QuantFormat, np.ndarray]]:
    """Random packed bytes (rows, row_bytes) of the format named for each tensor."""
    rng = np.random.default_rng(0)
    packed = {}
    for name, format_name in formats.items():
        rows, columns = folder.shapes[name]
        chosen = FORMATS[format_name]
        packed[name] = (chosen, rng.integers(0, 256, (rows, chosen.row_bytes(columns)), dtype=np.uint8))
    return packed
