"""ggml's own C quantizers, as numerical reference for tests and benchmarks.

The shared library is the one inside the installed xllamacpp wheel. Only scalars and pointers cross the border.
"""

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantizers.formats.table import QuantFormat

_FLOATS = ctypes.POINTER(ctypes.c_float)


@cache
def _library() -> ctypes.CDLL:
    """ggml with typed signatures. Raises FileNotFoundError if no library of the wheel exports them."""
    import xllamacpp  # noqa: PLC0415  (slow to load, and needed by few callers)

    package = Path(xllamacpp.__file__).parent
    for path in sorted([*package.glob("*.so*"), *package.parent.glob("xllamacpp.libs/*.so*")]):
        library = ctypes.CDLL(str(path))
        if hasattr(library, "ggml_quantize_chunk"):
            return _typed(library)
    raise FileNotFoundError(f"no shared library in {package} exports ggml_quantize_chunk")


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    int64, size = ctypes.c_int64, ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, _FLOATS, ctypes.c_void_p, int64, int64, int64, _FLOATS]
    library.ggml_quantize_chunk.restype = size
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, size]
    library.ggml_validate_row_data.restype = ctypes.c_bool
    return library


def _floats(array: np.ndarray) -> "ctypes._Pointer[ctypes.c_float]":
    return array.ctypes.data_as(_FLOATS)


def quantize(fmt: QuantFormat, W: Tensor, importance: Tensor | None = None) -> Tensor:
    """``ggml_quantize_chunk``: W (rows, columns), importance (columns,) -> uint8 (rows, row_bytes)."""
    rows, columns = W.shape
    source = np.ascontiguousarray(W.detach().numpy(), dtype=np.float32)
    weights = None if importance is None else np.ascontiguousarray(importance.numpy(), dtype=np.float32)
    data = np.zeros((rows, fmt.row_bytes(columns)), dtype=np.uint8)
    pointer = None if weights is None else _floats(weights)
    written = _library().ggml_quantize_chunk(
        int(fmt.ggml_type), _floats(source), data.ctypes.data, 0, rows, columns, pointer
    )
    if written != data.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes of {fmt.name}, expected {data.nbytes}")
    return torch.from_numpy(data)


def dequantize(fmt: QuantFormat, data: Tensor) -> Tensor:
    """``dequantize_row_*``: uint8 (rows, row_bytes) -> float32 (rows, columns)."""
    source = np.ascontiguousarray(data.numpy())
    weights = source.size // fmt.block_bytes * fmt.block_size
    values = np.empty(weights, dtype=np.float32)
    decode = getattr(_library(), "dequantize_row_" + fmt.name.lower().replace("_k", "_K"))
    decode.argtypes, decode.restype = [ctypes.c_void_p, _FLOATS, ctypes.c_int64], None
    decode(source.ctypes.data, _floats(values), weights)
    return torch.from_numpy(values).view(len(source), -1)


def is_valid(fmt: QuantFormat, data: Tensor) -> bool:
    """``ggml_validate_row_data``: whether ggml accepts these bytes."""
    source = np.ascontiguousarray(data.numpy())
    return bool(_library().ggml_validate_row_data(int(fmt.ggml_type), source.ctypes.data, source.nbytes))


def round_trip(name: str, block_bytes: int, x: Tensor) -> Tensor:
    """``quantize_row_<name>_ref`` and ``dequantize_row_<name>`` of float32 x (rows, columns)."""
    source = np.ascontiguousarray(x.numpy(), dtype=np.float32)
    block = 256 if name.lower().endswith("_k") else 32
    data, values = np.zeros(source.size // block * block_bytes, dtype=np.uint8), np.empty_like(source)
    encode, decode = (getattr(_library(), f) for f in (f"quantize_row_{name}_ref", f"dequantize_row_{name}"))
    encode.argtypes, encode.restype = [_FLOATS, ctypes.c_void_p, ctypes.c_int64], None
    decode.argtypes, decode.restype = [ctypes.c_void_p, _FLOATS, ctypes.c_int64], None
    encode(_floats(source), data.ctypes.data, source.size)
    decode(data.ctypes.data, _floats(values), source.size)
    return torch.from_numpy(values)
