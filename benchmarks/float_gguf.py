"""The unquantized model as a GGUF file: what llama-quantize starts from, and what a runtime is held against."""

from pathlib import Path

import numpy as np

from exporters.files.gguf_writer import export_gguf
from exporters.metadata.source import ModelSource
from quantizers.formats.table import FORMATS, QuantFormat
from quantizers.rounding.nearest import quantize


def export_float(
    source: ModelSource, path: str | Path, name: str = "F32", *, allow_missing_tokenizer: bool = False
) -> int:
    """Write ``source`` with its matrices in F32 or F16; return the file's bytes."""
    fmt = FORMATS[name]
    assert fmt.is_float

    def packed(tensor: str) -> tuple[QuantFormat, np.ndarray]:
        return fmt, quantize(fmt, source.read(tensor)).numpy()

    return export_gguf(source, packed, path, allow_missing_tokenizer=allow_missing_tokenizer)
