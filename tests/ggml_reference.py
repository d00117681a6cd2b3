"""ggml's own C quantizers, as numerical reference for tests and benchmarks.

The shared library is the one inside the installed xllamacpp wheel. Only scalars and pointers cross the border.
"""

import ctypes

import numpy as np
import torch
from torch import Tensor

from exporters.runtime.ggml import FLOATS, floats, library
from quantizers.formats.table import QuantFormat


def quantize(fmt: QuantFormat, W: Tensor, importance: Tensor | None = None) -> Tensor:
    """``ggml_quantize_chunk``: W (rows, columns), importance (columns,) -> uint8 (rows, row_bytes)."""
    rows, columns = W.shape
    source = np.ascontiguousarray(W.detach().numpy(), dtype=np.float32)
    weights = None if importance is None else np.ascontiguousarray(importance.numpy(), dtype=np.float32)
    data = np.zeros((rows, fmt.row_bytes(columns)), dtype=np.uint8)
    pointer = None if weights is None else floats(weights)
    written = library().ggml_quantize_chunk(
        int(fmt.ggml_type), floats(source), data.ctypes.data, 0, rows, columns, pointer
    )
    if written != data.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes of {fmt.name}, expected {data.nbytes}")
    return torch.from_numpy(data)


def dequantize(fmt: QuantFormat, data: Tensor) -> Tensor:
    """``dequantize_row_*``: uint8 (rows, row_bytes) -> float32 (rows, columns)."""
    source = np.ascontiguousarray(data.numpy())
    weights = source.size // fmt.block_bytes * fmt.block_size
    values = np.empty(weights, dtype=np.float32)
    decode = getattr(library(), "dequantize_row_" + fmt.name.lower().replace("_k", "_K"))
    decode.argtypes, decode.restype = [ctypes.c_void_p, FLOATS, ctypes.c_int64], None
    decode(source.ctypes.data, floats(values), weights)
    return torch.from_numpy(values).view(len(source), -1)


def is_valid(fmt: QuantFormat, data: Tensor) -> bool:
    """``ggml_validate_row_data``: whether ggml accepts these bytes."""
    source = np.ascontiguousarray(data.numpy())
    return bool(library().ggml_validate_row_data(int(fmt.ggml_type), source.ctypes.data, source.nbytes))


def round_trip(name: str, block_bytes: int, x: Tensor) -> Tensor:
    """``quantize_row_<name>_ref`` and ``dequantize_row_<name>`` of float32 x (rows, columns)."""
    source = np.ascontiguousarray(x.numpy(), dtype=np.float32)
    block = 256 if name.lower().endswith("_k") else 32
    data, values = np.zeros(source.size // block * block_bytes, dtype=np.uint8), np.empty_like(source)
    encode, decode = (getattr(library(), f) for f in (f"quantize_row_{name}_ref", f"dequantize_row_{name}"))
    encode.argtypes, encode.restype = [FLOATS, ctypes.c_void_p, ctypes.c_int64], None
    decode.argtypes, decode.restype = [ctypes.c_void_p, FLOATS, ctypes.c_int64], None
    encode(floats(source), data.ctypes.data, source.size)
    decode(data.ctypes.data, floats(values), source.size)
    return torch.from_numpy(values)
