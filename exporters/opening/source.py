"""Reads the headers of the GGUF files that hold a model: one file, or the parts of a split one."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from bitgenome.common.errors import UserError
from exporters.files.gguf_reader import GgufContents, StoredTensor, read_gguf

FLOATS = ("F32", "F16", "BF16")  # stored as they are in a Hugging Face folder
PART = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")  # llama.cpp's LLAMA_SPLIT_PATH
TYPE = re.compile(
    r"[-._]([IT]?Q\d\w*|MXFP4\w*|BF16|F16|F32)$", re.IGNORECASE
)  # of the weights, at the end of a file's name


class GgufModelError(UserError):
    """Raised for a GGUF file that is no model that transformers can build; the message is one sentence for the user."""


@dataclass(frozen=True)
class GgufModel:
    """Holds the headers of a model's files, whose key-values are those of the first part."""

    parts: tuple[GgufContents, ...]

    @property
    def path(self) -> Path:
        """The file, or its first part."""
        return self.parts[0].path

    @cached_property
    def key_values(self) -> Mapping[str, Any]:
        """The key-values of the model; a number that was rounded to float32 is the shortest that is rounded to it."""
        values = self.parts[0].key_values
        return {key: shortest(value) for key, value in values.items()}

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's graph."""
        return str(self.key_values["general.architecture"])

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor of all parts, by GGUF name, in file order."""
        return {name: tensor for part in self.parts for name, tensor in part.tensors.items()}

    def hyperparameters(self) -> dict[str, Any]:
        """Return the key-values of the model's graph, without their prefix."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix): value for key, value in self.key_values.items() if key.startswith(prefix)}

    def floats(self, name: str) -> np.ndarray:
        """Return a tensor by GGUF name as float32, in its stored shape, (..., rows, columns)."""
        return next(part for part in self.parts if name in part.tensors).dequantized(name)

    @property
    def coarse(self) -> tuple[str, ...]:
        """The types of the tensors that are no floats, the one of most weights first."""
        weights: dict[str, int] = {}
        for tensor in self.tensors.values():
            if tensor.type_name not in FLOATS:
                weights[tensor.type_name] = weights.get(tensor.type_name, 0) + prod(tensor.shape)
        return tuple(sorted(weights, key=lambda kind: (-weights[kind], kind)))


def shortest(value: Any) -> Any:
    """Return the shortest number that float32 rounds to ``value``, which is what was rounded; other values as is."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def stem_of(path: Path) -> str:
    """Return the name of the model in a file: without ending, number of a part, and type of the weights."""
    found = PART.match(path.name)
    return TYPE.sub("", found["stem"] if found else path.stem)


def parts_of(path: Path) -> list[Path]:
    """Return the file at ``path``, or all parts of the split file that it is the first part of.

    Raises GgufModelError for another part than the first.
    """
    found = PART.match(path.name)
    if found is None:
        return [path]
    count = int(found["count"])
    parts = [path.with_name(f"{found['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    if int(found["number"]) != 1:
        raise GgufModelError(f"expected the first part of a split GGUF file, {parts[0].name}, found {path}")
    return parts


def files_of(path: Path) -> list[Path]:
    """Return ``parts_of`` a file; raise GgufModelError for one that is missing."""
    parts = parts_of(path)
    if missing := [part for part in parts if not part.is_file()]:
        what = f"the {len(parts)} parts of {path}" if len(parts) > 1 else f"a GGUF file at {path}"
        raise GgufModelError(f"expected {what}, found {'no ' + missing[0].name if len(parts) > 1 else 'none'}")
    return parts


def read_model(path: Path) -> GgufModel:
    """Return the headers of the model at ``path``, a GGUF file or the first part of a split one.

    Raises GgufModelError for a file that is missing, damaged, or no model of text.
    """
    try:
        parts = tuple(read_gguf(file) for file in files_of(path))
    except ValueError as error:
        raise GgufModelError(str(error)) from None
    count = parts[0].key_values.get("split.count", 0)
    if max(count, 1) != len(parts):
        raise GgufModelError(
            f"expected the file names of a split GGUF file, such as NAME-00001-of-{count:05}.gguf, found {path}, "
            f"which says that it is one of {count} parts"
        )
    for number, part in enumerate(parts[1:], 1):
        if (found := part.key_values.get("split.no")) != number:
            raise GgufModelError(f"expected part {number + 1} of {len(parts)} in {part.path}, found split.no {found}")
    model = GgufModel(parts)
    kind = model.key_values.get("general.type", "model")
    if kind != "model" or "general.architecture" not in model.key_values:
        raise GgufModelError(f"expected a model in {path}, found a GGUF file of type {kind!r} with no weights of one")
    stored, expected = len(model.tensors), model.key_values.get("split.tensors.count")
    if expected is not None and expected != stored:
        raise GgufModelError(f"expected {expected} tensors in the parts of {path}, found {stored}")
    return model
