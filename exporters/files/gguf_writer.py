"""Writes a model as one GGUF file: packed tensors are copied byte for byte, all others stored in floats.

    header | key-values | tensor table | padding | tensor data, each padded to the alignment

The length of everything before the data does not depend on the tensor types. So the exact file size is known in advance
for any choice of types, and the data can be written before the table that describes it. Shapes: (rows, columns).
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType

from bitgenome.common.files import replacing
from bitgenome.common.steps import steps
from exporters.files.built_layout import BuiltLayout
from exporters.files.file_layout import FileLayout, FileTensor
from exporters.metadata.provenance import Provenance
from exporters.metadata.source import ModelSource
from quantizers.formats.table import QuantFormat, padded

log = logging.getLogger(__name__)

Packed = Callable[[str], tuple[QuantFormat, np.ndarray]]


def fixed_bytes(source: ModelSource, genes: int | None = None, *, allow_missing_tokenizer: bool = False) -> int:
    """Return the bytes of the built file that no choice of types changes.

    The model directory's name is in the file, so renaming it changes the size. Reads no weights. Raises as
    ``BuiltLayout`` does for a model that cannot be exported without a template.
    """
    return BuiltLayout(source, allow_missing_tokenizer).fixed_bytes(genes)


def export_gguf(
    source: ModelSource,
    packed: Packed,
    path: str | Path,
    provenance: Provenance | None = None,
    f32_overrides: Mapping[str, torch.Tensor] | None = None,
    *,
    layout: FileLayout | None = None,
    allow_missing_tokenizer: bool = False,
    check: Callable[[Path], None] = lambda written: None,
) -> int:
    """Write ``source`` to ``path`` atomically, one tensor in memory at a time, and return the file's size in bytes.

    ``packed`` maps a Hugging Face name to its format and its bytes, uint8 (rows, row_bytes) in transformers' row
    order. ``f32_overrides`` replaces float32 tensors (norms, biases) by Hugging Face name. ``layout`` is what the file
    holds, built from ``source`` by default. Raises ValueError if bytes
    or overrides do not fit their tensor, and then leaves ``path`` as it was; so does ``check``, which gets the written
    file before it replaces ``path``, by raising. For a model that cannot be exported it raises as ``BuiltLayout`` does.
    """
    layout = layout or BuiltLayout(source, allow_missing_tokenizer)
    overrides = dict(f32_overrides or {})
    unknown = overrides.keys() - set(layout.float_names)
    if unknown:
        raise ValueError(f"expected overrides of float32 tensors, found {', '.join(sorted(unknown))}")
    read = float_reader(source, overrides)

    def data(tensor: FileTensor) -> tuple[GGMLQuantizationType, np.ndarray]:
        if tensor.searched:
            return _packed_rows(tensor, packed)
        rows = tensor.float_rows(read) if tensor.gather else layout.stored(tensor)
        if rows.nbytes != tensor.float_bytes:
            raise ValueError(f"expected {tensor.float_bytes} bytes of {tensor.name}, found {rows.nbytes}")
        return GGMLQuantizationType[tensor.type_name], rows

    size = write_file(layout, data, Path(path), provenance, check)
    if provenance:  # no file that is written on the way to others
        log.debug("wrote %s: %d tensors, %d bytes", path, len(layout.tensors), size)
    return size


def float_reader(source: ModelSource, overrides: Mapping[str, torch.Tensor]) -> Callable[[str], torch.Tensor]:
    """Return a function that reads a tensor by Hugging Face name: that of ``overrides``, else of ``source``.

    The function raises ValueError for one of ``overrides`` that has not the tensor's shape.
    """

    def read(name: str) -> torch.Tensor:
        if name not in overrides:
            return source.read(name)
        tensor, expected = overrides[name], tuple(source.shapes[name])
        if tuple(tensor.shape) != expected:
            raise ValueError(f"expected shape {expected} for {name}, found {tuple(tensor.shape)}")
        return tensor

    return read


def _packed_rows(tensor: FileTensor, packed: Packed) -> tuple[GGMLQuantizationType, np.ndarray]:
    """Return type and bytes of a searched tensor, rows in the file's order."""
    assert tensor.gather is not None
    rows, found = dict(tensor.gather.sources), set()

    def read(name: str) -> np.ndarray:
        quant_format, data = packed(name)
        expected = (rows[name], quant_format.row_bytes(tensor.shape[-1]))
        if data.dtype != np.uint8 or data.shape != expected:
            raise ValueError(
                f"expected {quant_format.name} bytes uint8 {expected} for {name}, found {data.dtype} {data.shape}"
            )
        found.add(quant_format)
        return data

    data = tensor.gather.collect(read)
    if len(found) != 1:
        names = sorted(quant_format.name for quant_format in found)
        raise ValueError(f"expected one type for all of {tensor.name}, found {', '.join(names)}")
    return found.pop().ggml_type, data


def write_file(
    layout: FileLayout,
    data: Callable[[FileTensor], tuple[GGMLQuantizationType, np.ndarray]],
    path: Path,
    provenance: Provenance | None = None,
    check: Callable[[Path], None] = lambda written: None,
) -> int:
    """Write a file of ``layout`` to ``path`` atomically, and return its size.

    ``data`` gives each tensor's type and bytes; ``provenance`` and ``check`` are as for ``export_gguf``.
    """
    types: dict[str, GGMLQuantizationType] = {}
    start = len(layout.header({}, provenance))
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            file.seek(start)
            for tensor in steps(layout.tensors, len(layout.tensors), "tensor"):
                types[tensor.name], rows = data(tensor)
                file.write(np.ascontiguousarray(rows).data)
                file.write(bytes(padded(rows.nbytes) - rows.nbytes))
            size = file.tell()
            header = layout.header(types, provenance)
            assert len(header) == start, "the header's length must not depend on the types"
            file.seek(0)
            file.write(header)
        check(temporary)
    return size
