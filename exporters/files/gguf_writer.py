"""Writes a model as one GGUF file: packed tensors are copied byte for byte, all others stored in float32.

    header | key-values | tensor table | padding | tensor data, each padded to the alignment

The length of everything before the data does not depend on the tensor types. So the exact file size is known in advance
for any choice of types, and the data can be written before the table that describes it. Shapes: (rows, columns).
"""

import io
import logging
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.gguf_writer import WriterState

from bitgenome.common.files import replacing
from bitgenome.common.steps import steps
from exporters.metadata.architectures import architecture_of, dimensions_of
from exporters.metadata.hyperparameters import model_metadata
from exporters.metadata.provenance import Provenance
from exporters.metadata.rope import frequency_factors, rope_of
from exporters.metadata.source import ModelSource
from exporters.metadata.tensor_names import TensorEntry, tensor_table, to_file_rows
from exporters.metadata.tokenizer import tokenizer_metadata
from quantizers.formats.table import FORMATS, QuantFormat, padded

log = logging.getLogger(__name__)

Packed = Callable[[str], tuple[QuantFormat, np.ndarray]]
F32 = GGMLQuantizationType.F32
ROPE_FACTORS = "rope_freqs.weight"


class _Layout:
    """Holds a file's list of tensors and the key-values that do not depend on the tensor types."""

    def __init__(self, source: ModelSource, allow_missing_tokenizer: bool):
        self.architecture = architecture_of(source)
        self.rope_factors = frequency_factors(rope_of(source.config), dimensions_of(source).head_dim)
        self.entries = tensor_table(source)
        if self.rope_factors is not None:  # first, as in llama.cpp's own conversions
            self.entries.insert(0, TensorEntry("", ROPE_FACTORS, self.rope_factors.shape, quantizable=False))
        self.quantizable = [entry for entry in self.entries if entry.quantizable]
        self.keys = model_metadata(source) | tokenizer_metadata(source, allow_missing_tokenizer)

    def header(self, types: Mapping[str, GGMLQuantizationType], provenance: Provenance | None) -> bytes:
        """Return all bytes before the tensor data, given ``types`` by GGUF name (float32 where none is given)."""
        writer = GGUFWriter(None, self.architecture.name)
        keys: dict = dict(self.keys)
        if provenance is not None:
            names = [types.get(entry.gguf_name, F32).name for entry in self.quantizable]
            keys |= provenance.key_values(names)
        for key, (value, kind) in keys.items():
            writer.add_key_value(key, value, kind)
        for entry in self.entries:
            kind = types.get(entry.gguf_name, F32)
            size = FORMATS[kind.name].tensor_bytes(entry.shape)
            writer.add_tensor_info(entry.gguf_name, entry.shape, np.dtype(np.float32), size, raw_dtype=kind)
        buffer = io.BytesIO()
        writer.fout, writer.state = [buffer], WriterState.EMPTY  # write to memory instead of a file that it opens
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        return _pad(buffer.getvalue())


def fixed_bytes(source: ModelSource, genes: int | None = None, *, allow_missing_tokenizer: bool = False) -> int:
    """Return the bytes of the file that no choice of types changes: all but the padded data of quantizable tensors.

    ``genes`` is the length of the genome in the provenance, by default one gene for each quantizable tensor. The
    model directory's name is in the file, so renaming it changes the size. Reads no weights. Raises
    UnsupportedArchitectureError, TokenizerError or UnknownPretokenizerError for a model that cannot be exported.
    """
    layout = _Layout(source, allow_missing_tokenizer)
    blank = Provenance.blank(len(layout.quantizable) if genes is None else genes)
    floats = (entry for entry in layout.entries if not entry.quantizable)
    return len(layout.header({}, blank)) + sum(padded(4 * prod(entry.shape)) for entry in floats)


def export_gguf(
    source: ModelSource,
    packed: Packed,
    path: str | Path,
    provenance: Provenance | None = None,
    f32_overrides: Mapping[str, torch.Tensor] | None = None,
    *,
    allow_missing_tokenizer: bool = False,
    check: Callable[[Path], None] = lambda written: None,
) -> int:
    """Write ``source`` to ``path`` atomically, one tensor in memory at a time, and return the file's size in bytes.

    ``packed`` maps a Hugging Face name to its format and its bytes, uint8 (rows, row_bytes) in transformers' row
    order. ``f32_overrides`` replaces float32 tensors (norms, biases) by Hugging Face name. Raises ValueError if bytes
    or overrides do not fit their tensor, and then leaves ``path`` as it was; so does ``check``, which gets the written
    file before it replaces ``path``, by raising. For a model that cannot be exported it raises as ``fixed_bytes`` does.
    """
    layout = _Layout(source, allow_missing_tokenizer)
    overrides = dict(f32_overrides or {})
    unknown = overrides.keys() - {entry.hf_name for entry in layout.entries if not entry.quantizable}
    if unknown:
        raise ValueError(f"expected overrides of float32 tensors, found {', '.join(sorted(unknown))}")

    def data(entry: TensorEntry) -> tuple[GGMLQuantizationType, np.ndarray]:
        if not entry.quantizable:
            return F32, _float_rows(source, layout, entry, overrides)
        quant_format, rows = packed(entry.hf_name)
        expected = (entry.shape[0], quant_format.row_bytes(entry.shape[1]))
        if rows.dtype != np.uint8 or rows.shape != expected:
            raise ValueError(
                f"expected {quant_format.name} bytes uint8 {expected} for {entry.hf_name}, "
                f"found {rows.dtype} {rows.shape}"
            )
        return quant_format.ggml_type, to_file_rows(entry, rows)

    return _write(layout, data, Path(path), provenance, check)


def _float_rows(
    source: ModelSource,
    layout: _Layout,
    entry: TensorEntry,
    overrides: dict[str, torch.Tensor],
) -> np.ndarray:
    """Return a tensor's float32 values as little-endian bytes, uint8 (rows, row_bytes), rows in the file's order."""
    if entry.gguf_name == ROPE_FACTORS:
        assert layout.rope_factors is not None
        tensor = torch.from_numpy(layout.rope_factors)
    else:
        replaced = overrides.get(entry.hf_name)
        tensor = source.read(entry.hf_name) if replaced is None else replaced.detach().cpu()
    if tuple(tensor.shape) != entry.shape:
        raise ValueError(f"expected shape {entry.shape} for {entry.hf_name}, found {tuple(tensor.shape)}")
    contiguous = tensor.to(torch.float32).contiguous()
    rows = contiguous.view(torch.uint8).numpy().reshape(entry.shape[0], -1)
    return to_file_rows(entry, rows)


def _write(
    layout: _Layout,
    data: Callable[[TensorEntry], tuple[GGMLQuantizationType, np.ndarray]],
    path: Path,
    provenance: Provenance | None,
    check: Callable[[Path], None],
) -> int:
    types: dict[str, GGMLQuantizationType] = {}
    start = len(layout.header({}, provenance))
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            file.seek(start)
            for entry in steps(layout.entries, len(layout.entries), "tensor"):
                types[entry.gguf_name], rows = data(entry)
                file.write(np.ascontiguousarray(rows).data)
                file.write(bytes(padded(rows.nbytes) - rows.nbytes))
            size = file.tell()
            header = layout.header(types, provenance)
            assert len(header) == start, "the header's length must not depend on the types"
            file.seek(0)
            file.write(header)
        check(temporary)
    log.info("wrote %s: %d tensors, %d bytes", path, len(layout.entries), size)
    return size


def _pad(data: bytes) -> bytes:
    return data.ljust(padded(len(data)), b"\0")
