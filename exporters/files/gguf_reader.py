"""Reads GGUF files back, checking every length against the file's size before using it.

On a damaged file gguf's own reader loops and llama.cpp may abort the process; this one raises a ValueError.
Format: docs/gguf.md of ggml.
"""

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_MAGIC, GGUF_VERSION, GGMLQuantizationType, GGUFValueType, dequantize

from quantizers.formats.table import GGUF_ALIGNMENT, padded

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
DECODED_WEIGHTS = 1 << 20  # weights that are decoded at once


class _DamageError(Exception):
    """Says what is damaged; ``read_gguf`` puts the message at the end of its own."""


@dataclass(frozen=True)
class StoredTensor:
    """Describes one tensor of the file, with ``offset`` from the start of the file and ``size`` in bytes."""

    name: str
    type_name: str
    shape: tuple[int, ...]  # (rows, columns)
    offset: int
    size: int


@dataclass(frozen=True)
class GgufContents:
    """Holds the key-values and the tensor table of a file whose lengths were checked, and reads its tensors."""

    path: Path
    key_values: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]  # by GGUF name, in file order
    key_spans: Mapping[str, tuple[int, int]]  # first byte of each key, and the one behind its value

    def encoded(self, keys: Iterable[str]) -> bytes:
        """Return key-values as they are stored."""
        with self.path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            return b"".join(data[slice(*self.key_spans[key])] for key in keys)

    def read(self, name: str) -> np.ndarray:
        """Return the stored bytes of a tensor by GGUF name, uint8 (rows, row_bytes); a vector is one row."""
        tensor = self.tensors[name]
        return np.array(self.mapped(name)).reshape(tensor.shape[0] if len(tensor.shape) > 1 else 1, -1)

    def mapped(self, name: str) -> np.ndarray:
        """Return the stored bytes of a tensor by GGUF name, uint8 (size,), of which only what is used is read."""
        tensor = self.tensors[name]
        return np.memmap(self.path, np.uint8, "r", offset=tensor.offset, shape=(tensor.size,))

    def dequantized(self, name: str) -> np.ndarray:
        """Return a tensor by GGUF name as float32, in the file's row order."""
        tensor, columns = self.tensors[name], self.tensors[name].shape[-1]
        kind, rows = GGMLQuantizationType[tensor.type_name], self.read(name).reshape(prod(tensor.shape[:-1]), -1)
        values = np.empty((len(rows), columns), np.float32)
        step = max(1, DECODED_WEIGHTS // columns)
        for start in range(0, len(rows), step):  # decoding takes several times the memory of what it decodes
            values[start : start + step] = dequantize(rows[start : start + step], kind)
        return values.reshape(tensor.shape)

    def head(self) -> np.ndarray:
        """Return the head's weight, float32 (V, D): that of the output or, if tied, of the embedding."""
        return self.dequantized("output.weight" if "output.weight" in self.tensors else "token_embd.weight")


def read_gguf(path: str | Path) -> GgufContents:
    """Parse the header of ``path`` without reading tensor data.

    Raises ValueError if the file is missing, not a GGUF file, truncated or inconsistent; the message is one sentence.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"expected a GGUF file, found none at {path}")
    if path.stat().st_size < len(b"GGUF"):
        raise ValueError(f"expected a GGUF file, found {path.stat().st_size} bytes at {path}")
    try:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            return _parse(path, data)
    except _DamageError as damage:
        raise ValueError(f"expected a complete GGUF file at {path}, found {damage}") from None


class _Cursor:
    """Reads values from ``data`` in order, and raises _DamageError rather than read past its end."""

    def __init__(self, data: mmap):
        self.data = data
        self.position = 0

    def take(self, count: int) -> bytes:
        """Read ``count`` bytes."""
        if count > len(self.data) - self.position:
            raise _DamageError(f"an end at byte {len(self.data)} inside its header")
        self.position += count
        return self.data[self.position - count : self.position]

    def scalars(self, code: str, count: int = 1) -> tuple[Any, ...]:
        """Read ``count`` little-endian numbers of struct's format ``code``."""
        size = struct.calcsize(f"<{code}")
        return struct.unpack(f"<{count}{code}", self.take(size * count))

    def string(self) -> str:
        """Read a string: its length in bytes, then UTF-8."""
        try:
            return self.take(self.scalars("Q")[0]).decode("utf-8")
        except UnicodeDecodeError:
            raise _DamageError(f"text that is not UTF-8 before byte {self.position}") from None

    def value(self, kind: int) -> Any:
        """Read a value of GGUF value type ``kind``."""
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.ARRAY:
            inner, count = self.scalars("I")[0], self.scalars("Q")[0]
            if inner in _SCALARS:
                size = struct.calcsize(f"<{_SCALARS[GGUFValueType(inner)]}")
                if count * size > len(self.data):
                    raise _DamageError(f"an array of {count} values in {len(self.data)} bytes")
                return list(self.scalars(_SCALARS[GGUFValueType(inner)], count))
            if inner != GGUFValueType.STRING:
                raise _DamageError(f"an array of values of type {inner} before byte {self.position}")
            return [self.string() for _ in range(count)]
        if kind in _SCALARS:
            return self.scalars(_SCALARS[GGUFValueType(kind)])[0]
        raise _DamageError(f"an unknown value type {kind} before byte {self.position}")


def _parse(path: Path, data: mmap) -> GgufContents:
    cursor = _Cursor(data)
    magic = cursor.scalars("I")[0]
    if magic != GGUF_MAGIC:
        raise _DamageError(f"the first bytes {magic.to_bytes(4, 'little')!r} instead of b'GGUF'")
    version = cursor.scalars("I")[0]
    if version != GGUF_VERSION:
        raise _DamageError(f"GGUF version {version} instead of {GGUF_VERSION}")
    tensor_count, key_count = cursor.scalars("Q", 2)
    key_values, spans = {}, {}
    for _ in range(key_count):
        start = cursor.position
        key = cursor.string()
        key_values[key] = cursor.value(cursor.scalars("I")[0])
        spans[key] = (start, cursor.position)
    table = [_table_row(cursor) for _ in range(tensor_count)]
    if key_values.get("general.alignment", GGUF_ALIGNMENT) != GGUF_ALIGNMENT:
        raise _DamageError(f"an alignment of {key_values['general.alignment']} instead of {GGUF_ALIGNMENT}")
    start = padded(cursor.position)
    tensors = {}
    for name, kind, shape, offset in table:
        tensor = _stored(name, kind, shape, start + offset)
        if tensor.offset + tensor.size > len(data):
            raise _DamageError(
                f"{len(data)} bytes where tensor {name} ends at byte {tensor.offset + tensor.size}: it is truncated"
            )
        tensors[name] = tensor
    return GgufContents(path, key_values, tensors, spans)


def _table_row(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name = cursor.string()
    dimensions = cursor.scalars("I")[0]
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise _DamageError(f"{dimensions} dimensions of tensor {name}")
    shape = tuple(reversed(cursor.scalars("Q", dimensions)))
    kind, offset = cursor.scalars("I")[0], cursor.scalars("Q")[0]
    return name, kind, shape, offset


def _stored(name: str, kind: int, shape: tuple[int, ...], offset: int) -> StoredTensor:
    if kind not in set(GGMLQuantizationType):
        raise _DamageError(f"an unknown type {kind} of tensor {name}")
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if shape[-1] % block:
        raise _DamageError(f"rows of {shape[-1]} weights of tensor {name} in blocks of {block}")
    size = prod(shape) // block * block_bytes
    return StoredTensor(name, GGMLQuantizationType(kind).name, shape, offset, size)
