"""Finds or writes the original of a run's file: its model in floats, as a GGUF file."""

from pathlib import Path

import numpy as np
import torch

from exporters.files.file_layout import FileLayout
from exporters.files.gguf_writer import export_gguf
from exporters.metadata.source import ModelSource
from exporters.opening.source import GgufModel, read_model
from exporters.template.layout import TemplateLayout
from quantizers.formats.table import FORMATS, QuantFormat

STORED = {  # as what the matrices of a model are written, by the type in which it stores them
    torch.float32: FORMATS["F32"],
    torch.float16: FORMATS["F16"],
    torch.bfloat16: QuantFormat("BF16", "W16", 1, 2),
}


def original_of(source: ModelSource, layout: FileLayout, path: Path) -> GgufModel:
    """Return the model in floats as a GGUF file: a run's template, or else one that is written to ``path``."""
    if isinstance(layout, TemplateLayout):
        return read_model(layout.path)
    write_original(source, path, layout)
    return read_model(path)


def write_original(source: ModelSource, path: Path, layout: FileLayout | None = None) -> int:
    """Write a model with its matrices in the type in which it stores them; return the file's bytes.

    ``layout`` is what the file holds, built by default. Raises what ``export_gguf`` raises.
    """

    def packed(name: str) -> tuple[QuantFormat, np.ndarray]:
        tensor = source.read(name).contiguous()
        rows = tensor.view(torch.uint8).numpy().reshape(tensor.shape[0], -1)
        return STORED[tensor.dtype], rows

    return export_gguf(source, packed, path, layout=layout)
