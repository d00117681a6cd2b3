"""This module keeps the Hessians of groups of rows in files, one for each use of a tensor: as a head, for lookups."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor

from bitgenome.common.errors import UserError
from bitgenome.common.files import replacing
from bitgenome.common.tensor_files import holds_tensors
from quantizers.statistics.row_groups import RowSums

Role = Literal["head", "lookup"]
ROLES: tuple[Role, ...] = ("head", "lookup")


def sums_name(tensor: str, role: Role) -> str:
    """Return the name of what is summed over the uses of a tensor in a ``role``."""
    return f"{tensor}@{role}"


def summed_tensor(name: str) -> str | None:
    """Return the tensor whose sums have a ``sums_name``, None for other names."""
    tensor, _, role = name.rpartition("@")
    return tensor if role in ROLES else None


def save_sums(path: Path, sums: RowSums) -> None:
    """Write sums atomically."""
    with replacing(path) as temporary:
        members = {member.name: getattr(sums, member.name) for member in fields(RowSums)}
        save_file({name: tensor.cpu().contiguous() for name, tensor in members.items()}, temporary)


def load_sums(path: Path) -> RowSums:
    """Return the sums in a file, on the CPU. Raises UserError if it is missing or damaged."""
    try:
        return RowSums(**load_file(path))
    except (OSError, SafetensorError, TypeError) as error:
        raise UserError(f"expected Hessians of rows in {path}, found {error}: the next attempt measures them") from None


def load_labels(path: Path) -> Tensor:
    """Return the groups (V,) of the rows in a readable file of sums, without the sums."""
    with safe_open(path, framework="pt") as file:
        labels: Tensor = file.get_tensor("labels")
    return labels


def sums_readable(path: Path) -> bool:
    """Return whether the file of sums exists and is complete."""
    return holds_tensors(path, [member.name for member in fields(RowSums)])


def load_all_sums(paths: Sequence[Path]) -> RowSums:
    """Return the sums over all uses of a tensor together. Raises as ``load_sums``."""
    first, *others = paths
    found = load_sums(first)
    for path in others:
        found.add(load_sums(path))
    return found
