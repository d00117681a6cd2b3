"""This module holds what calibration measures of one input: its Hessian and its moments, in a file for each input."""

from dataclasses import dataclass, fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import safe_open, save, save_file
from torch import Tensor

from bitgenome.common.files import atomic_write_bytes, replacing
from bitgenome.common.tensor_files import holds_tensors
from quantizers.statistics.moments import InputStatistics


@dataclass(frozen=True)
class InputGroup:
    """Holds the names of the tensors (rows, columns) that multiply one input, and what was measured of that input.

    ``hessian`` is (columns, columns), ``statistics`` are the moments (columns,) of each feature. ``name`` is the first
    tensor's without ".weight". ``count`` is how many positions chose the expert that reads the input, None for what
    all read.
    """

    name: str
    tensors: tuple[str, ...]
    hessian: Tensor
    statistics: InputStatistics
    count: int | None = None

    def save(self, path: Path) -> None:
        """Write the group atomically as a safetensors file, in float32."""
        metadata = {"name": self.name, "tensors": "\n".join(self.tensors)}
        if self.count is not None:
            metadata["count"] = str(self.count)
        members = {"hessian": self.hessian, **self.statistics.tensors()}
        with replacing(path) as temporary:  # without a copy in memory: the Hessian may take gigabytes
            save_file({key: t.float().cpu().contiguous() for key, t in members.items()}, temporary, metadata)

    @classmethod
    def load(cls, path: Path) -> "InputGroup":
        """Read a group from a file of ``save``, onto the CPU."""
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            statistics = InputStatistics(**{f.name: file.get_tensor(f.name) for f in fields(InputStatistics)})
            tensors = tuple(metadata["tensors"].split("\n"))
            count = int(metadata["count"]) if "count" in metadata else None
            return cls(metadata["name"], tensors, file.get_tensor("hessian"), statistics, count)


def group_file(directory: Path, name: str) -> Path:
    """Return the path of the input group ``name`` in ``directory``."""
    return directory / f"{name}.safetensors"


def mean_squares(path: Path) -> Tensor:
    """Return the mean square (columns,) of each input feature from an input group's file, without its Hessian."""
    with safe_open(path, framework="pt") as file:
        values: Tensor = file.get_tensor("mean_square")
    return values


def positions_of(path: Path) -> int | None:
    """Return how many positions chose the expert that reads an input group, from its file; None for what all read."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return int(metadata["count"]) if "count" in metadata else None


def group_readable(path: Path) -> bool:
    """Return whether the file of an input group exists and is complete."""
    return holds_tensors(path, ("hessian", "mean_square"))


def statistics_readable(path: Path) -> bool:
    """Return whether a file holds the moments of an input group, with its Hessian or without it."""
    try:
        with safe_open(path, framework="pt") as file:
            return {"tensors", "name"} <= set(file.metadata() or ()) and "mean_square" in file.keys()  # noqa: SIM118
    except (OSError, SafetensorError):
        return False


def copy_statistics(source: Path, target: Path) -> None:
    """Write to ``target`` all that ``source``, the file of an input group, holds beside the Hessian."""
    with safe_open(source, framework="pt") as file:
        members = {key: file.get_tensor(key) for key in file.keys() if key != "hessian"}  # noqa: SIM118
        atomic_write_bytes(target, save(members, file.metadata()))
