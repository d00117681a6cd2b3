"""An importance matrix that llama-quantize reads: the mean square of every input feature, by GGUF tensor name.

Format: GGUF as llama-imatrix writes it (tools/imatrix/imatrix.cpp): sums of squares and their counts.
"""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np


def write_imatrix(path: Path, importance: Mapping[str, np.ndarray], tokens: int, window: int, dataset: str) -> None:
    """Write ``importance`` float32 (columns,) of each GGUF tensor, measured on ``tokens`` in windows of ``window``."""
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
