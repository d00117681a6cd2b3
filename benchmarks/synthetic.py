"""Random Llama models of any depth with a bank of plainly rounded tensors: right in size, and quickly made."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from evaluators.data.windows import TokenWindows
from evaluators.engine.evaluator import EvaluatorSetup
from evaluators.engine.memory import Load
from evaluators.model.folder import ModelFolder
from evaluators.prepare.bank import save_tensor
from quantizers.formats.packed_tensor import PackedTensor
from quantizers.formats.table import format_for
from quantizers.rounding.nearest import quantize
from quantizers.rounding.row_choice import Compensated
from search.fitness import FitnessSettings
from search.types import SearchSpace

LEVELS = ("W2", "W4")
VOCABULARY = 8192
WINDOW = 512


def random_model(path: Path, layers: int, hidden: int = 512, vocabulary: int = VOCABULARY) -> Path:
    """A Llama folder in bfloat16: MLP of three times ``hidden``, half as many key heads as query heads of 64."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path, max_shard_size="2MB")
    return path


def rounded_bank(folder: ModelFolder, directory: Path) -> SearchSpace:
    """Every matrix at LEVELS, without compensation; errors of 1, for nothing reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    shapes = {name: shape for name, shape in folder.shapes.items() if len(shape) == 2}
    for name, shape in shapes.items():
        weights = folder.read(name).float()
        formats = [format_for(level, shape[1]) for level in LEVELS]
        packed = {fmt.name: PackedTensor(fmt, quantize(fmt, weights), shape) for fmt in formats}
        save_tensor(directory, name, {kind: Compensated(p, 1.0, 1.0) for kind, p in packed.items()})
    return SearchSpace.per_tensor(shapes, LEVELS, 0)


def synthetic_setup(path: Path, layers: int, tokens: int, load: Load, memory: int | None = None) -> EvaluatorSetup:
    """Model, bank and random text under ``path``, made where they are not there yet."""
    model, bank, text = path / "model", path / "bank", path / "windows.safetensors"
    if not text.is_file():
        rounded_bank(ModelFolder(random_model(model, layers)), bank)
        ids = np.random.default_rng(0).integers(0, VOCABULARY, (tokens // WINDOW, WINDOW))
        text.write_bytes(TokenWindows({"search": ids}, "").to_bytes())
    folder = ModelFolder(model)
    shapes = {name: shape for name, shape in folder.shapes.items() if len(shape) == 2}
    space = SearchSpace.per_tensor(shapes, LEVELS, 0)
    return EvaluatorSetup(model, bank, text, space, FitnessSettings(), "synthetic", memory=memory, load=load)
