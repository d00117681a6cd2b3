"""Quantizes as llama-quantize does, by ggml's own C functions, which the xllamacpp package's library exports.

llama-quantize itself is not in that library. What it does beside choosing types (``exporters.files.mixes``) is to call
``ggml_quantize_chunk`` on the rows of each tensor. Only numbers and pointers cross the border.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from bitgenome.common.cpus import usable_cpus

FLOATS = ctypes.POINTER(ctypes.c_float)
CHUNK_WEIGHTS = 1 << 18  # that a thread takes at once


@cache
def library() -> ctypes.CDLL:
    """Return ggml with typed signatures. Raises FileNotFoundError if no library of xllamacpp exports its functions."""
    found = find_spec("xllamacpp")
    package = Path(found.origin).parent if found and found.origin else Path("xllamacpp")
    for path in sorted([*package.glob("*.so*"), *package.parent.glob("xllamacpp.libs/*.so*")]):
        loaded = ctypes.CDLL(str(path))
        if hasattr(loaded, "ggml_quantize_chunk"):
            return _typed(loaded)
    raise FileNotFoundError(f"no shared library in {package} exports ggml_quantize_chunk")


def _typed(loaded: ctypes.CDLL) -> ctypes.CDLL:
    integer, size = ctypes.c_int64, ctypes.c_size_t
    loaded.ggml_quantize_chunk.argtypes = [ctypes.c_int, FLOATS, ctypes.c_void_p, integer, integer, integer, FLOATS]
    loaded.ggml_quantize_chunk.restype = size
    loaded.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, size]
    loaded.ggml_validate_row_data.restype = ctypes.c_bool
    loaded.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    loaded.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    return loaded


def floats(array: np.ndarray) -> "ctypes._Pointer[ctypes.c_float]":
    """Return the address of a contiguous float32 array."""
    return array.ctypes.data_as(FLOATS)


def quantize_chunk(kind: GGMLQuantizationType, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """Return ``rows`` float32 (rows, columns) in the type ``kind``, uint8 (rows, row_bytes).

    ``importance`` float32 (columns,) are mean squares of the inputs; types that need some and get none count all
    columns alike, where ggml would end the process. Raises RuntimeError for what ggml does not take.
    """
    block, block_bytes = GGML_QUANT_SIZES[kind]
    count, columns = rows.shape
    if importance is None and library().ggml_quantize_requires_imatrix(int(kind)):
        importance = np.ones(columns, np.float32)
    source = np.ascontiguousarray(rows, np.float32)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    data = np.zeros((count, columns // block * block_bytes), np.uint8)
    pointer = None if weights is None else floats(weights)
    written = library().ggml_quantize_chunk(int(kind), floats(source), data.ctypes.data, 0, count, columns, pointer)
    if written != data.nbytes or not library().ggml_validate_row_data(int(kind), data.ctypes.data, data.nbytes):
        raise RuntimeError(f"expected {data.nbytes} valid bytes of {kind.name} from ggml, found {written}")
    return data


def requantize(
    stored: np.ndarray, source: GGMLQuantizationType, kind: GGMLQuantizationType, importance: np.ndarray | None
) -> np.ndarray:
    """Return a matrix, or a stack of them, in the type ``kind``, uint8 (matrices, rows, row_bytes), by all CPUs.

    ``stored`` are its bytes uint8 (matrices, rows, row_bytes) in the type ``source``; ``importance`` float32
    (matrices, columns). The bytes do not depend on how many threads there are.
    """
    matrices, rows, row_bytes = stored.shape
    columns = row_bytes // GGML_QUANT_SIZES[source][1] * GGML_QUANT_SIZES[source][0]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    out = np.empty((matrices, rows, columns // block * block_bytes), np.uint8)
    step = max(1, CHUNK_WEIGHTS // columns)

    def chunk(place: tuple[int, int]) -> None:
        matrix, start = place
        taken = slice(start, start + step)
        values = dequantize(np.ascontiguousarray(stored[matrix, taken]), source)
        weights = None if importance is None else importance[matrix]
        out[matrix, taken] = quantize_chunk(kind, values, weights)

    library()
    with ThreadPoolExecutor(usable_cpus()) as pool:
        list(pool.map(chunk, ((matrix, start) for matrix in range(matrices) for start in range(0, rows, step))))
    return out
