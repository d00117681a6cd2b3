"""Writes and reads importance matrices as llama-imatrix does: the mean squares of input features, by GGUF tensor name.

Format: GGUF as written by llama-imatrix (tools/imatrix/imatrix.cpp), with sums of squares and their counts.
"""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np

from bitgenome.common.errors import UserError
from exporters.files.gguf_reader import read_gguf

MAGIC = b"GGUF"
IMATRIX = "imatrix"
SUMS, COUNTS = ".in_sum2", ".counts"
INTEGER = struct.Struct("<i")
LONGEST_NAME = 1 << 12  # bytes; a file of something else would have longer ones


def write_imatrix(
    path: Path,
    importance: Mapping[str, np.ndarray],
    tokens: int,
    window: int,
    dataset: str,
    counts: Mapping[str, Sequence[int | None]] | None = None,
) -> None:
    """Write ``importance``, the mean squares (columns,) or (matrices, columns) by GGUF tensor name, to ``path``.

    They were measured on ``tokens`` tokens of ``dataset`` in windows of ``window`` tokens. ``counts`` says which of the
    matrices of a stack, such as experts, only some positions have reached: at least 1 is written, as llama-quantize
    takes no squares that nothing has reached, and those of such an expert are the mean over its layer.
    """
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", tokens // window)
    writer.add_uint32("imatrix.chunk_size", window)
    for name, squares in importance.items():
        matrices = np.atleast_2d(squares.astype(np.float32))
        given = (counts or {}).get(name) or [None] * len(matrices)
        reached = np.array([[tokens if n is None else max(1, n)] for n in given], dtype=np.float32)
        writer.add_tensor(f"{name}.in_sum2", matrices * reached)
        writer.add_tensor(f"{name}.counts", reached)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class ImatrixError(UserError):
    """Raised for a file that is no importance matrix; the message is one sentence for the user."""


def read_imatrix(path: Path) -> dict[str, np.ndarray]:
    """Return the mean squares float32 (matrices, columns) of the inputs of each tensor, by GGUF tensor name.

    ``path`` is what llama-imatrix writes: a GGUF file, or the older binary form, of which all matrices of a tensor are
    in one row. A matrix that no input has reached counts all columns alike. Raises ImatrixError for a file of another
    form, one that is cut, and for values that are negative or not finite.
    """
    data = path.read_bytes()
    try:
        found = _read_gguf(path) if data.startswith(MAGIC) else _read_old(data)
    except (ValueError, struct.error) as error:
        raise ImatrixError(f"expected an importance matrix by llama-imatrix in {path}, found: {error}") from None
    for name, values in found.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise ImatrixError(f"expected finite mean squares of {name} in {path}, found others")
    return found


def _read_gguf(path: Path) -> dict[str, np.ndarray]:
    contents = read_gguf(path)
    if (kind := contents.key_values.get("general.type")) != IMATRIX:
        raise ValueError(f"a GGUF file of type {kind or 'model'}")
    found = {}
    for stored in contents.tensors:
        name = stored.removesuffix(SUMS)
        if name == stored:
            continue
        if name + COUNTS not in contents.tensors:
            raise ValueError(f"no counts of {name}")
        sums = np.atleast_2d(contents.dequantized(stored))
        counts = contents.dequantized(name + COUNTS).reshape(-1, 1)
        if len(counts) != len(sums):
            raise ValueError(f"{len(counts)} counts of {name} for {len(sums)} matrices")
        found[name] = np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32)
    if not found:
        raise ValueError("no tensors")
    return found


def _read_old(data: bytes) -> dict[str, np.ndarray]:
    """Read entries of name, number of calls, number of values, and values: mean squares times the calls."""
    place = 0

    def integer(most: int) -> int:
        nonlocal place
        (value,) = INTEGER.unpack_from(data, place)
        place += INTEGER.size
        if not 0 <= value <= most:
            raise ValueError("something else, or a cut file")
        return int(value)

    found = {}
    for _ in range(integer(len(data) // (3 * INTEGER.size))):
        length = integer(min(LONGEST_NAME, len(data) - place))
        name = data[place : place + length].decode("utf-8")
        place += length
        calls, count = integer(1 << 31), integer((len(data) - place) // 4)
        values = np.frombuffer(data, "<f4", count, place)
        place += values.nbytes
        found[name] = (values / calls if calls else np.ones_like(values))[None]
    if not found:
        raise ValueError("no tensors")
    return found
