"""Maps Hugging Face tensors to GGUF tensors: names, file order, row permutation, and which may be quantized.

Shapes are (rows, columns), as in transformers; the table of a GGUF file lists them reversed.
"""

import re
from dataclasses import dataclass

import numpy as np
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

from exporters.metadata.architectures import UnsupportedArchitectureError, architecture_of, dimensions_of
from exporters.metadata.source import ModelSource

# Buffers of old checkpoints that follow from config.json, so nothing is lost without them.
DERIVED_BUFFERS = (
    re.compile(r"(^|\.)rotary_emb\.inv_freq$"),
    re.compile(r"(^|\.)self_attn\.(bias|masked_bias)$"),
)
GRAPHS = {name: graph for graph, name in MODEL_ARCH_NAMES.items()}  # by llama.cpp's architecture name
BLOCK_ORDER = (  # order of a block's tensors in the file, which is the order of use
    "attn_norm", "attn_q", "attn_q_norm", "attn_k", "attn_k_norm", "attn_v", "attn_output",
    "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
)  # fmt: skip
END_ORDER = ("token_embd", "blk", "output_norm", "output")
QUANTIZABLE_KINDS = frozenset(
    {"token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}
)


@dataclass(frozen=True)
class TensorEntry:
    """Describes one tensor of the file."""

    hf_name: str
    gguf_name: str
    shape: tuple[int, ...]
    quantizable: bool  # False: stays float32
    permuted_heads: int = 0  # number of heads whose rows are reordered; 0: rows stay as they are

    @property
    def kind(self) -> str:
        """Kind of tensor, e.g. "attn_q" or "token_embd"."""
        return self.gguf_name.split(".")[-2]


def tensor_table(source: ModelSource) -> list[TensorEntry]:
    """Return every tensor of ``source`` that the file holds, in file order: embedding, blocks, final norm, head.

    Raises UnsupportedArchitectureError for an architecture or a tensor that a GGUF file cannot hold.
    """
    architecture, sizes = architecture_of(source), dimensions_of(source)
    names = get_tensor_name_map(GRAPHS[architecture.name], sizes.layers)
    heads = {"attn_q": sizes.heads, "attn_k": sizes.kv_heads} if architecture.permutes_qk else {}
    entries = []
    for hf_name, shape in source.shapes.items():
        if any(pattern.search(hf_name) for pattern in DERIVED_BUFFERS):
            continue
        gguf_name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        kind, suffix = (gguf_name or "..").split(".")[-2:]
        if suffix not in ("weight", "bias") or (suffix == "bias" and kind not in architecture.biases):
            raise UnsupportedArchitectureError(
                f"tensor {hf_name} {tuple(shape)} has no place in a {architecture.name} GGUF file: expected only the "
                f"tensors of a plain {source.config['model_type']} model"
            )
        quantizable = len(shape) == 2 and kind in QUANTIZABLE_KINDS
        entries.append(TensorEntry(hf_name, gguf_name, tuple(shape), quantizable, heads.get(kind, 0)))
    return sorted(entries, key=lambda entry: place_of(entry.gguf_name))


def place_of(name: str) -> tuple[int, int, int, str]:
    """Return a key that sorts GGUF names by use: ends, blocks, kinds of BLOCK_ORDER, and behind them other kinds."""
    first, *rest = name.split(".")
    if first == "blk":
        kind = BLOCK_ORDER.index(rest[1]) if rest[1] in BLOCK_ORDER else len(BLOCK_ORDER)
        return END_ORDER.index("blk"), int(rest[0]), kind, ".".join(rest[1:])
    return END_ORDER.index(first) if first in END_ORDER else len(END_ORDER), 0, 0, ".".join(rest)


def quantizable_tensors(source: ModelSource) -> dict[str, tuple[int, ...]]:
    """Return the shapes (rows, columns), by Hugging Face name, of all tensors that may be quantized, in file order.

    Raises UnsupportedArchitectureError as ``tensor_table`` does.
    """
    return {entry.hf_name: entry.shape for entry in tensor_table(source) if entry.quantizable}


def row_order(entry: TensorEntry) -> np.ndarray | None:
    """Return row indices, int64 (rows,), that bring rows into the file's order, or None if the order is the same.

    Within each head, transformers stores the two halves of the rotary pairs one after the other, while llama.cpp
    interleaves them (``LlamaModel.permute`` in convert_hf_to_gguf.py).
    """
    if not entry.permuted_heads:
        return None
    rows = entry.shape[0]
    return np.arange(rows).reshape(entry.permuted_heads, 2, -1).swapaxes(1, 2).reshape(rows)


def to_file_rows(entry: TensorEntry, rows: np.ndarray) -> np.ndarray:
    """Reorder ``rows`` (rows, ...), floats or packed bytes, from transformers' row order to the file's."""
    order = row_order(entry)
    return rows if order is None else rows[order]


def from_file_rows(entry: TensorEntry, rows: np.ndarray) -> np.ndarray:
    """Reorder ``rows`` (rows, ...) from the file's row order to transformers'; the inverse of ``to_file_rows``."""
    order = row_order(entry)
    return rows if order is None else rows[np.argsort(order)]
