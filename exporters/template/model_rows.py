"""Reads a model's tensors as rows along their inputs, rounded to the type in which a template stores them."""

from math import prod

import numpy as np
import torch

from exporters.files.file_layout import TORCH_TYPES
from exporters.metadata.source import ModelSource
from exporters.template.row_hashes import row_hashes

Hashed = tuple[str, bool, str]  # name, whether transposed, type


class ModelRows:
    """Reads rows of ``source``, one tensor in memory at a time, and keeps their hashes."""

    def __init__(self, source: ModelSource):
        self.source = source
        self._hashes: dict[Hashed, np.ndarray] = {}

    def columns(self, name: str, transposed: bool) -> int:
        """Return the number of columns of a matrix, or of a stack of matrices."""
        return self.source.shapes[name][-2 if transposed else -1]

    def count(self, name: str, transposed: bool) -> int:
        """Return the number of rows of a matrix, or of all matrices of a stack."""
        return prod(self.source.shapes[name]) // self.columns(name, transposed)

    def read(self, name: str, transposed: bool, type_name: str) -> np.ndarray:
        """Return the rows in type ``type_name`` as bytes, uint8 (n, row_bytes)."""
        tensor = self.source.read(name).to(torch.float32).to(TORCH_TYPES[type_name])
        matrix = (tensor.transpose(-1, -2) if transposed else tensor).contiguous()
        rows = matrix.flatten().view(torch.uint8)  # flat, as strides of rows of one weight may be any
        return rows.reshape(-1, matrix.shape[-1] * matrix.element_size()).numpy()

    def hashes(self, name: str, transposed: bool, type_name: str) -> np.ndarray:
        """Return the hash of every row in type ``type_name``, uint64 (n,)."""
        key = (name, transposed, type_name)
        if key not in self._hashes:
            self._hashes[key] = row_hashes(self.read(*key))
        return self._hashes[key]
