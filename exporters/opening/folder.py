"""Opens a GGUF model: writes the Hugging Face folder of it, with configuration, tokenizer, and weights by tensor."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from bitgenome.common import layout
from bitgenome.common.files import atomic_write_json, atomic_write_text, replacing
from bitgenome.common.steps import steps
from exporters.opening.configuration import configuration
from exporters.opening.source import GgufModel, read_model
from exporters.opening.tokenizer import TokenizerFiles, tokenizer_files
from exporters.opening.weights import OpenedTensor, opened_tensors

SHARD_BYTES = 4 << 30
INDEX = "model.safetensors.index.json"
ALIGNMENT = 8  # of the data in a safetensors file
TYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # of safetensors


@dataclass(frozen=True)
class OpenableModel:
    """Holds all of a GGUF model but its weights, checked: it can be written as a folder."""

    source: GgufModel
    config: PretrainedConfig
    tokenizer: TokenizerFiles
    tensors: Sequence[OpenedTensor]

    @property
    def bytes(self) -> int:
        """Bytes of the weights in the folder."""
        return sum(map(_bytes, self.tensors))


def openable(path: Path) -> OpenableModel:
    """Return the model in a GGUF file, or in the parts of which it is the first; no weight is read.

    Raises GgufModelError (one sentence) for a file that no folder can be made of.
    """
    source = read_model(path)
    config = configuration(source)
    return OpenableModel(source, config, tokenizer_files(source), opened_tensors(source, config))


def write_folder(model: OpenableModel, directory: Path, weights: bool = True) -> None:
    """Write ``model`` to ``directory``, which is created if need be; opened.json is written last.

    Takes the memory of one tensor. Without ``weights`` the files of weights have their headers, sizes and nothing else,
    and opened.json lists none of them. Raises StorageError if the disk is full.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for file in (directory / layout.OPENED, *directory.glob(".*.tmp")):  # the latter of a writer that was killed
        file.unlink(missing_ok=True)
    atomic_write_json(directory / "config.json", _config_json(model.config))
    atomic_write_json(directory / "tokenizer.json", model.tokenizer.tables, indent=None)
    atomic_write_json(directory / "tokenizer_config.json", model.tokenizer.config)
    if model.tokenizer.chat_template:
        atomic_write_text(directory / "chat_template.jinja", model.tokenizer.chat_template)
    shards, total = _shards(model.tensors), len(model.tensors)
    written: dict[str, dict[str, Any]] = {}
    for name, tensors in shards.items():
        done = sum(len(shards[earlier]) for earlier in written)
        written[name] = _write_shard(directory / name, tensors, weights, done, total)
    if len(shards) > 1:
        files = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
        atomic_write_json(directory / INDEX, {"metadata": {"total_size": model.bytes}, "weight_map": files})
    record = {"parts": [part.path.name for part in model.source.parts], "coarse": list(model.source.coarse)}
    atomic_write_json(directory / layout.OPENED, record | {"files": written if weights else {}})


def _config_json(config: PretrainedConfig) -> dict[str, Any]:
    """Return a configuration as config.json has it: all of its settings, so that later defaults do not change it."""
    settings: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    settings["architectures"] = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    return {key: value for key, value in settings.items() if not key.startswith("_") and value is not None}


def _bytes(tensor: OpenedTensor) -> int:
    return prod(tensor.shape) * tensor.dtype.itemsize


def _shards(tensors: Sequence[OpenedTensor]) -> Mapping[str, list[OpenedTensor]]:
    """Return the tensors of each file, in order and of up to SHARD_BYTES."""
    parts: list[list[OpenedTensor]] = [[]]
    for tensor in tensors:
        if parts[-1] and sum(map(_bytes, parts[-1])) + _bytes(tensor) > SHARD_BYTES:
            parts.append([])
        parts[-1].append(tensor)
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, 1)}


def _write_shard(path: Path, tensors: list[OpenedTensor], weights: bool, done: int, total: int) -> dict[str, Any]:
    """Write a file of weights and return its size and, with ``weights``, its sha256.

    ``done`` of the ``total`` tensors are in other files.
    """
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)  # so that each is aligned to its type
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in ordered:
        entry = {"dtype": TYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[tensor.name] = entry | {"data_offsets": [start, start + _bytes(tensor)]}
        start += _bytes(tensor)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    content, digest = len(text).to_bytes(ALIGNMENT, "little") + text, hashlib.sha256()
    with replacing(path) as temporary, temporary.open("wb") as stream:
        stream.write(content)
        digest.update(content)
        if not weights:
            stream.truncate(len(content) + start)
            return {"bytes": len(content) + start}
        for tensor in steps(ordered, total, "tensor", done):
            data = tensor.read().view(torch.uint8).numpy().data
            stream.write(data)
            digest.update(data)
    return {"bytes": len(content) + start, "sha256": digest.hexdigest()}
