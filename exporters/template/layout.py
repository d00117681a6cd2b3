"""A file as its template holds it: key-values, tensors and their order, with the searched tensors' bytes replaced."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bitgenome.common.files import atomic_write_bytes
from exporters.files.file_layout import FileLayout, FileTensor, Gather, encoded_keys
from exporters.metadata.hyperparameters import mixed_types
from exporters.opening.source import GgufModel
from exporters.template.candidates import may_be_quantized
from exporters.template.explanation import Explanation

OURS = "bitgenome."
SPLIT = "split."
RECORD = "explanation"


class TemplateLayout(FileLayout):
    """Holds what a file holds that is made after a template."""

    def __init__(self, template: GgufModel, explanation: Explanation):
        self._template = template
        self.tensors = explanation.tensors
        self.refused, self.unhealed = explanation.refused, explanation.unhealed
        self.left_out = explanation.left_out

    @cached_property
    def retyped(self) -> dict[str, list[str]]:
        """GGUF names of the matrices whose type is not the template's, which loses values of the model, by type."""
        found: dict[str, list[str]] = {}
        for tensor in self.tensors:
            if tensor.retyped:
                found.setdefault(tensor.type_name, []).append(tensor.name)
        return found

    @cached_property
    def unsearched(self) -> list[FileTensor]:
        """The matrices that llama.cpp's quantizer would not leave in floats, and that are no gene."""
        return [t for t in self.tensors if not t.searched and may_be_quantized(t.name, t.shape)]

    @property
    def path(self) -> Path:
        """The template, or its first part."""
        return self._template.path

    def key_values(self) -> tuple[int, bytes]:
        """Return number and bytes of the key-values: the template's, and those of a file with several types."""
        ours = mixed_types()
        first = self._template.parts[0]
        kept = [key for key in first.key_values if key not in ours and not key.startswith((OURS, SPLIT))]
        return len(kept) + len(ours), first.encoded(kept) + encoded_keys(ours)

    def stored(self, tensor: FileTensor) -> np.ndarray:
        """Return the bytes of a tensor that is copied from the template, uint8."""
        return next(part for part in self._template.parts if tensor.name in part.tensors).read(tensor.name)


def save_explanation(explanation: Explanation, path: Path) -> None:
    """Write what was found of a template to ``path``."""
    orders, rows = {}, []
    for tensor in explanation.tensors:
        row = {"name": tensor.name, "shape": tensor.shape, "searched": tensor.searched}
        row |= {key: getattr(tensor, key) for key in ("type_name", "added", "retyped", "transposed")}
        if tensor.gather:
            row["sources"] = tensor.gather.sources
            if tensor.gather.order is not None:
                orders[tensor.name] = tensor.gather.order
        rows.append(row)
    record = {"tensors": rows, "refused": explanation.refused, "unhealed": explanation.unhealed}
    record["left_out"] = sorted(explanation.left_out)
    atomic_write_bytes(path, save(orders, {RECORD: json.dumps(record)}))


def load_explanation(path: Path) -> Explanation | None:
    """Return what ``save_explanation`` wrote, None if there is no whole file at ``path``."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            record = json.loads((file.metadata() or {})[RECORD])
            orders = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
    return Explanation(
        tuple(_tensor(row, orders.get(row["name"])) for row in record["tensors"]),
        record["refused"],
        tuple(record["unhealed"]),
        frozenset(record["left_out"]),
    )


def _tensor(row: dict[str, Any], order: np.ndarray | None) -> FileTensor:
    sources = tuple((name, rows) for name, rows in row.pop("sources", ()))
    gather = Gather(sources, order) if sources else None
    return FileTensor(**row | {"shape": tuple(row["shape"])}, gather=gather)
