"""Makes small models with random weights that show a mistake: no weight is what a forgotten one would be."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from benchmarks.models.case import COMMON, Case
from benchmarks.models.vocabulary import SIZE, write_tokenizer

NOISE = 0.1  # of vectors: norms, biases, gates
DAMPING = 1 / 256


def config_of(case: Case) -> PreTrainedConfig:
    """Return the configuration: the type's own, made small. Raises ValueError for a setting that the type lacks."""
    kind = CONFIG_MAPPING[case.type]
    known = {*kind().to_dict(), *kind.attribute_map, "attn_implementation"}
    if unknown := sorted({*case.settings} - known):
        raise ValueError(f"expected settings of {case.type}, found {', '.join(unknown)}")
    settings: dict[str, Any] = {key: value for key, value in COMMON.items() if key in known}
    if case.tokenizer != "byte level":
        settings |= {"bos_token_id": 1, "eos_token_id": 2}
    settings |= {"vocab_size": SIZE + len(case.added)} | case.settings
    return kind(**settings)


def make_model(case: Case, path: Path, seed: int = 0) -> PreTrainedModel:
    """Write the model and its tokenizer to the folder ``path``, in float32, and return the model.

    config.json is as published models of the type have it.
    """
    torch.manual_seed(seed)
    config = config_of(case)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    randomize(model, case.damped)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    saved = json.loads((path / "config.json").read_text(encoding="utf-8")) | case.published
    if case.architecture:
        saved["architectures"] = [case.architecture]
    (path / "config.json").write_text(json.dumps(saved, indent=1), encoding="utf-8")
    write_tokenizer(path, case.tokenizer != "byte level", case.tokenizer == "sentencepiece", case.added)
    return model


@torch.no_grad()
def randomize(model: PreTrainedModel, damped: str = "") -> None:
    """Draw the weights anew: matrices keep an input's size, vectors get noise on what they are.

    Parameters whose names ``damped`` matches become small by DAMPING; norms that add one to their weights too.
    """
    for name, tensor in model.state_dict().items():  # without the buffers that are computed, such as a rope's
        if not tensor.is_floating_point():
            continue
        offset = float(tensor.ndim == 1 and "norm" in name and not tensor.any())  # Gemma's norms multiply by 1 + weight
        if tensor.ndim < 2:
            tensor.add_(torch.randn_like(tensor) * NOISE)
        else:
            tensor.copy_(torch.randn_like(tensor) * tensor.shape[-1] ** -0.5)
        if damped and re.search(damped, name):
            tensor.add_(offset).mul_(DAMPING).sub_(offset)
