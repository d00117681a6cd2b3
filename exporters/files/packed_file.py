"""Reads the tensors of an exported GGUF file one by one, under the names and in the row order of their model."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from exporters.files.gguf_reader import read_gguf
from exporters.metadata.source import ModelSource
from exporters.metadata.tensor_names import from_file_rows, tensor_table
from quantizers.formats.packed_tensor import dequantize
from quantizers.formats.table import FORMATS, QuantFormat


class PackedFile:
    """Reads a GGUF file of ``source``'s model, tensor by tensor and by Hugging Face name.

    Raises ValueError as ``read_gguf`` does, and for a file that lacks a tensor of ``source`` or holds it in another
    shape.
    """

    def __init__(self, path: str | Path, source: ModelSource):
        self._contents = read_gguf(path)
        self._entries = {entry.hf_name: entry for entry in tensor_table(source)}
        for entry in self._entries.values():
            stored = self._contents.tensors.get(entry.gguf_name)
            if stored is None:
                raise ValueError(f"expected tensor {entry.gguf_name} in {path}, found none")
            if stored.shape != entry.shape:
                raise ValueError(f"expected {entry.gguf_name} {entry.shape} in {path}, found {stored.shape}")

    @property
    def names(self) -> list[str]:
        """Hugging Face names of all tensors, in file order."""
        return list(self._entries)

    @property
    def float_names(self) -> list[str]:
        """Hugging Face names of the tensors that are never quantized: norms and biases."""
        return [name for name, entry in self._entries.items() if not entry.quantizable]

    @cached_property
    def formats(self) -> Mapping[str, QuantFormat]:
        """Formats of the matrices by Hugging Face name. Raises ValueError for a type that is not in FORMATS."""
        kinds = {name: self.type_name(name) for name, entry in self._entries.items() if len(entry.shape) == 2}
        if unknown := [name for name, kind in kinds.items() if kind not in FORMATS]:
            raise ValueError(
                f"expected types {', '.join(FORMATS)} in {self._contents.path}, found {unknown[0]}: {kinds[unknown[0]]}"
            )
        return {name: FORMATS[kind] for name, kind in kinds.items()}

    def type_name(self, name: str) -> str:
        """Return ggml's name of the type in which a tensor is stored."""
        return self._contents.tensors[self._entries[name].gguf_name].type_name

    def packed(self, name: str) -> np.ndarray:
        """Return a tensor's bytes, uint8 (rows, row_bytes), as they were given to ``export_gguf``."""
        entry = self._entries[name]
        return from_file_rows(entry, self._contents.read(entry.gguf_name).reshape(entry.shape[0], -1))

    def floats(self, name: str) -> Tensor:
        """Return a tensor that is stored in float32, in its own shape. Raises ValueError if it has another type."""
        if self.type_name(name) != "F32":
            raise ValueError(f"expected F32 of {name} in {self._contents.path}, found {self.type_name(name)}")
        values = torch.from_numpy(np.ascontiguousarray(self.packed(name))).view(torch.float32)
        return values.reshape(self._entries[name].shape)

    def weights(self, name: str) -> Tensor:
        """Return a matrix of ``formats``, dequantized to float32 (rows, columns)."""
        return dequantize(self.formats[name], torch.from_numpy(np.ascontiguousarray(self.packed(name))))
