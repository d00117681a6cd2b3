"""Describes what a GGUF file holds, and which rows of the model's tensors stand behind each of its tensors.

Quantization works row by row, so a tensor that holds rows of the model in another order (heads permuted, experts
stacked, a slice of a fused weight) takes the rows' packed bytes as they are. Shapes: (rows, columns).
"""

import io
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUF_MAGIC, GGUF_VERSION, GGMLQuantizationType, GGUFWriter
from gguf.gguf_writer import WriterState

from exporters.metadata.key_values import KeyValues
from exporters.metadata.provenance import Provenance
from exporters.metadata.tensor_names import place_of
from quantizers.formats.table import padded

Types = Mapping[str, GGMLQuantizationType]  # of searched tensors, by GGUF name
TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Gather:
    """Holds which rows of the model make up a tensor of the file; the rows of a vector are its values."""

    sources: tuple[tuple[str, int], ...]  # Hugging Face name and number of rows
    order: np.ndarray | None = None  # int (rows,), into the rows of all sources in turn; None: all of them, in turn

    @property
    def names(self) -> tuple[str, ...]:
        """Hugging Face names of the sources."""
        return tuple(name for name, _ in self.sources)

    def collect(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """Return the rows of the file's tensor; ``read`` returns those of a source (rows, ...), one in memory."""
        if len(self.sources) == 1:
            rows = read(self.sources[0][0])
            return rows if self.order is None else rows[self.order]
        if self.order is None:
            return np.concatenate([read(name) for name in self.names])
        out: np.ndarray | None = None
        for name in self.names:
            found, (taken, places) = read(name), self._places(name)
            if out is None:
                out = np.empty((len(self.order), *found.shape[1:]), found.dtype)
            out[taken] = found[places]
        assert out is not None
        return out

    def scatter(self, rows: np.ndarray, name: str, out: np.ndarray) -> None:
        """Put the rows of the file's tensor that are of the source ``name`` into their places in ``out``."""
        taken, places = self._places(name)
        out[places] = rows[taken]

    def _places(self, name: str) -> tuple[np.ndarray | slice, np.ndarray | slice]:
        """Return the places of a source's rows, in the file's tensor and in the source."""
        start, counts = 0, dict(self.sources)
        for source, count in self.sources:
            if source == name:
                break
            start += count
        stop = start + counts[name]
        if self.order is None:
            return slice(start, stop), slice(None)
        taken = np.flatnonzero((self.order >= start) & (self.order < stop))
        return taken, self.order[taken] - start


@dataclass(frozen=True, eq=False)
class FileTensor:
    """Describes one tensor of the file."""

    name: str  # in GGUF
    shape: tuple[int, ...]  # (..., rows, columns), as stored
    gather: Gather | None = None  # None: not made of the model's tensors
    searched: bool = False  # its type is that of its gene
    type_name: str = "F32"  # in which it is stored where it is not searched
    added: float = 0.0  # to the model's values
    retyped: bool = False  # a matrix that is not searched or healed, in another type than its template's
    transposed: bool = False  # whether its rows are columns of the model's matrices

    @property
    def kind(self) -> str:
        """Kind of tensor, e.g. "attn_q" or "token_embd"."""
        return self.name.split(".")[-2] if "." in self.name else self.name

    @property
    def rows(self) -> int:
        """Number of rows; those of a vector are its values."""
        return prod(self.shape[:-1]) if len(self.shape) > 1 else self.shape[0]

    @property
    def float_bytes(self) -> int:
        """Bytes of a tensor that is not searched, without padding."""
        return stored_bytes(GGMLQuantizationType[self.type_name], self.shape)

    def float_rows(self, read: Callable[[str], torch.Tensor]) -> np.ndarray:
        """Return the bytes, uint8 (rows, row_bytes), of a tensor of the model that is not searched.

        ``read`` returns a tensor by Hugging Face name.
        """
        assert self.gather is not None

        def source(name: str) -> np.ndarray:
            values = read(name).detach().cpu().to(torch.float32)
            values = values.mT if self.transposed else values
            return values.reshape(-1, *(self.shape[-1:] if len(self.shape) > 1 else ())).numpy()

        values = torch.from_numpy(np.ascontiguousarray(self.gather.collect(source)))
        if self.added:
            values = values + self.added
        stored = values.to(TORCH_TYPES[self.type_name]).contiguous()
        return stored.view(torch.uint8).numpy().reshape(self.rows, -1)


class FileLayout(ABC):
    """Says what a file of a model holds. ``tensors`` are in file order."""

    tensors: Sequence[FileTensor]
    left_out: frozenset[str] = frozenset()  # Hugging Face names of the matrices that might be searched, and are not

    @abstractmethod
    def key_values(self) -> tuple[int, bytes]:
        """Return number and bytes of the key-values, without those of the provenance."""

    @abstractmethod
    def stored(self, tensor: FileTensor) -> np.ndarray:
        """Return the bytes of a tensor that is not made of the model's tensors, uint8."""

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes (rows, columns) of the model's tensors that may be searched, by Hugging Face name, in order of use.

        The order does not depend on the file's, so that a search of one model is one search.
        """
        return {
            name: (rows, tensor.shape[-1])
            for tensor in sorted(self.tensors, key=lambda tensor: place_of(tensor.name))
            if tensor.searched and tensor.gather
            for name, rows in tensor.gather.sources
        }

    @cached_property
    def names(self) -> dict[str, tuple[str, ...]]:
        """GGUF names of the tensors that hold rows of a model's tensor, by Hugging Face name."""
        found: dict[str, tuple[str, ...]] = {}
        for tensor in self.tensors:
            for name in tensor.gather.names if tensor.gather else ():
                found[name] = (*found.get(name, ()), tensor.name)
        return found

    @cached_property
    def kinds(self) -> dict[str, str]:
        """Kind of each of ``shapes``, such as attn_q."""
        return {
            name: tensor.kind
            for tensor in self.tensors
            if tensor.searched and tensor.gather
            for name in tensor.gather.names
        }

    @cached_property
    def float_names(self) -> tuple[str, ...]:
        """Hugging Face names of the tensors that the file keeps in float32: norms and biases, in order of use."""
        kept = (tensor for tensor in self.tensors if not tensor.searched and not tensor.retyped and tensor.gather)
        floats = sorted(kept, key=lambda tensor: place_of(tensor.name))
        return tuple(name for tensor in floats if tensor.gather for name in tensor.gather.names)

    @cached_property
    def tied(self) -> dict[str, str]:
        """The GGUF tensor of each tensor of the model that shares one with others, and hence its type."""
        shared = (tensor for tensor in self.tensors if tensor.searched and tensor.gather)
        return {n: t.name for t in shared if t.gather and len(t.gather.sources) > 1 for n in t.gather.names}

    @cached_property
    def kept(self) -> dict[str, str]:
        """Types of the matrices that are not searched, by GGUF name."""
        return {t.name: t.type_name for t in self.tensors if not t.searched and len(t.shape) > 1}

    @cached_property
    def searched(self) -> list[FileTensor]:
        """The tensors whose type is that of a gene, in file order."""
        return [tensor for tensor in self.tensors if tensor.searched]

    def header(self, types: Types, provenance: Provenance | None) -> bytes:
        """Return all bytes before the tensor data; its length does not depend on ``types`` (float32 where none is)."""
        kinds = {t.name: types.get(t.name, GGMLQuantizationType.F32) for t in self.searched}
        count, keys = self.key_values()
        ours = KeyValues() if provenance is None else provenance.key_values([kind.name for kind in kinds.values()])
        head = struct.pack("<IIQQ", GGUF_MAGIC, GGUF_VERSION, len(self.tensors), count + len(ours))
        table = [
            (tensor.name, tensor.shape, kinds.get(tensor.name, GGMLQuantizationType[tensor.type_name]))
            for tensor in self.tensors
        ]
        data = head + keys + encoded_keys(ours) + _encoded_table(table)
        return data.ljust(padded(len(data)), b"\0")

    def fixed_bytes(self, genes: int | None = None) -> int:
        """Return the bytes of the file that no choice of types changes: all but the padded data of searched tensors.

        ``genes`` is the length of the genome in the provenance, by default one gene for each of ``shapes``.
        """
        blank = Provenance.blank(len(self.shapes) if genes is None else genes)
        floats = (tensor for tensor in self.tensors if not tensor.searched)
        return len(self.header({}, blank)) + sum(padded(tensor.float_bytes) for tensor in floats)


def encoded_keys(keys: KeyValues) -> bytes:
    """Return key-values as a GGUF file holds them."""
    writer, buffer = _in_memory()
    for key, (value, kind) in keys.items():
        writer.add_key_value(key, value, kind)
    writer.state = WriterState.HEADER
    writer.write_kv_data_to_file()
    return buffer.getvalue()


def _encoded_table(rows: Sequence[tuple[str, tuple[int, ...], GGMLQuantizationType]]) -> bytes:
    """Return the table of tensors (name, shape, type), whose data stand one behind the other."""
    writer, buffer = _in_memory()
    for name, shape, kind in rows:
        writer.add_tensor_info(name, shape, np.dtype(np.float32), stored_bytes(kind, shape), raw_dtype=kind)
    writer.state = WriterState.KV_DATA
    writer.write_ti_data_to_file()
    return buffer.getvalue()


def stored_bytes(kind: GGMLQuantizationType, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor (..., columns) of type ``kind``, without padding."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return prod(shape) // block * block_bytes


def _in_memory() -> tuple[GGUFWriter, io.BytesIO]:
    """Return gguf's writer with no key-value yet, and the memory that it writes to instead of a file."""
    writer, buffer = GGUFWriter(None, ""), io.BytesIO()
    writer.kv_data, writer.fout = [{}], [buffer]
    return writer, buffer
