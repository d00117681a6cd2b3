"""Reads the tensors of an exported GGUF file one by one, under the names and in the row order of their model."""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from exporters.files.built_layout import BuiltLayout
from exporters.files.file_layout import FileLayout, FileTensor
from exporters.files.gguf_reader import read_gguf
from exporters.metadata.source import ModelSource
from quantizers.formats.packed_tensor import dequantize
from quantizers.formats.table import FORMATS, QuantFormat


class PackedFile:
    """Reads a GGUF file of ``source``'s model, tensor by tensor and by Hugging Face name.

    ``layout`` is what it holds, built from ``source`` by default. Raises ValueError as ``read_gguf`` does, and for a
    file that lacks a tensor of ``layout`` or holds it in another shape.
    """

    def __init__(self, path: str | Path, source: ModelSource, layout: FileLayout | None = None):
        self._contents = read_gguf(path)
        self._layout = layout or BuiltLayout(source, allow_missing_tokenizer=True)
        self._shapes = source.shapes
        self._tensors: dict[str, list[FileTensor]] = {}  # by Hugging Face name
        for tensor in self._layout.tensors:
            stored = self._contents.tensors.get(tensor.name)
            if stored is None and "split.count" in self._contents.key_values:
                raise ValueError(f"expected a whole file, found a shard without {tensor.name} in {path}")
            if stored is None:
                raise ValueError(f"expected tensor {tensor.name} in {path}, found none")
            if stored.shape != tensor.shape:
                raise ValueError(f"expected {tensor.name} {tensor.shape} in {path}, found {stored.shape}")
            for name in tensor.gather.names if tensor.gather else ():
                self._tensors.setdefault(name, []).append(tensor)

    @property
    def names(self) -> list[str]:
        """Hugging Face names of all tensors, in file order."""
        return list(self._tensors)

    @property
    def float_names(self) -> list[str]:
        """Hugging Face names of the tensors that are never quantized: norms and biases."""
        return list(self._layout.float_names)

    @cached_property
    def formats(self) -> Mapping[str, QuantFormat]:
        """Formats of the matrices by Hugging Face name. Raises ValueError for a type that is not in FORMATS."""
        kinds = {name: self.type_name(name) for name in self._layout.shapes}
        if unknown := [name for name, kind in kinds.items() if kind not in FORMATS]:
            raise ValueError(
                f"expected types {', '.join(FORMATS)} in {self._contents.path}, found {unknown[0]}: {kinds[unknown[0]]}"
            )
        return {name: FORMATS[kind] for name, kind in kinds.items()}

    def type_name(self, name: str) -> str:
        """Return ggml's name of the type in which a tensor is stored: of the first, where it stands in several."""
        return self._contents.tensors[self._tensors[name][0].name].type_name

    def packed(self, name: str) -> np.ndarray:
        """Return a tensor's bytes, uint8 (rows, row_bytes), as they were given to ``export_gguf``.

        Raises ValueError for one that stands in several tensors of the file, which have different types.
        """
        tensors = self._tensors[name]
        kinds = sorted({self._contents.tensors[tensor.name].type_name for tensor in tensors})
        if len(kinds) > 1:
            raise ValueError(f"expected one type for all of {name} in {self._contents.path}, found {', '.join(kinds)}")
        first, *_ = (tensor.gather for tensor in tensors)
        out: np.ndarray | None = None
        for tensor in tensors:
            assert tensor.gather is not None and first is not None
            rows = self._contents.mapped(tensor.name).reshape(tensor.rows, -1)  # an expert is a part of its stack
            if out is None:
                out = np.empty((dict(first.sources)[name], rows.shape[1]), np.uint8)
            tensor.gather.scatter(rows, name, out)
        assert out is not None
        return out

    def floats(self, name: str) -> Tensor:
        """Return a tensor that is stored in float32, in its own shape. Raises ValueError if it has another type."""
        if self.type_name(name) != "F32":
            raise ValueError(f"expected F32 of {name} in {self._contents.path}, found {self.type_name(name)}")
        values = torch.from_numpy(self.packed(name)).view(torch.float32)
        added = self._tensors[name][0].added
        return (values - added if added else values).reshape(self._shapes[name])

    def weights(self, name: str) -> Tensor:
        """Return a matrix of ``formats``, dequantized to float32 (rows, columns)."""
        return dequantize(self.formats[name], torch.from_numpy(self.packed(name)))

    def differing_floats(self, read: Callable[[str], Tensor]) -> list[str]:
        """Return the names of the tensors that are not searched and differ from what they are made of.

        ``read`` returns a tensor by Hugging Face name; one that is not made of the model's has its name in GGUF.
        """
        different = []
        for tensor in self._layout.tensors:
            if tensor.searched:
                continue
            same_type = self._contents.tensors[tensor.name].type_name == tensor.type_name
            expected = tensor.float_rows(read) if tensor.gather else self._layout.stored(tensor)
            if not same_type or not np.array_equal(self._contents.read(tensor.name).ravel(), expected.ravel()):
                different.append(tensor.gather.names[0] if tensor.gather else tensor.name)
        return different
