"""Writes an importance matrix for llama-quantize: the mean square of every input feature, by GGUF tensor name.

Format: GGUF as written by llama-imatrix (tools/imatrix/imatrix.cpp), with sums of squares and their counts.
"""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np


def write_imatrix(path: Path, importance: Mapping[str, np.ndarray], tokens: int, window: int, dataset: str) -> None:
    """Write ``importance``, the mean squares (columns,) by GGUF tensor name, to ``path``.

    They were measured on ``tokens`` tokens of ``dataset`` in windows of ``window`` tokens.
    """
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", tokens // window)
    writer.add_uint32("imatrix.chunk_size", window)
    for name, squares in importance.items():
        writer.add_tensor(f"{name}.in_sum2", (squares.astype(np.float32) * tokens)[None])
        writer.add_tensor(f"{name}.counts", np.full((1, 1), tokens, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
