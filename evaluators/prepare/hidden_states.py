"""Keeps the inputs of the block that a calibration has reached, from which it goes on after an interruption.

Saving costs about as much as the block's Hessians: at 80,000 tokens 1.3 GB for a model of 8B. Going through the blocks
again instead would read all weights before the block, and compute for minutes to hours; so they are saved.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import safe_open, save_file
from torch import Tensor

from bitgenome.common.files import replacing

NAME = re.compile(r"hidden-(\d+)\.safetensors")


@dataclass(frozen=True)
class HiddenStates:
    """Holds the inputs of ``block`` and what was measured on the way: block of each input group, from ``start`` on."""

    block: int
    start: int
    groups: Mapping[str, int]
    hidden: Tensor  # float32 (n, T, D)

    def save(self, directory: Path) -> None:
        """Write the states atomically to ``directory``, in place of those of earlier blocks there."""
        path = states_file(directory, self.block)
        metadata = {"start": str(self.start), "groups": json.dumps(dict(self.groups))}
        with replacing(path) as temporary:
            save_file({"hidden": self.hidden}, temporary, metadata)
        for other in saved_blocks(directory):
            if other < self.block:
                states_file(directory, other).unlink(missing_ok=True)

    @classmethod
    def load(cls, directory: Path, block: int) -> "HiddenStates | None":
        """Return the inputs of ``block`` from ``directory``; None if they are not there, or damaged."""
        try:
            with safe_open(states_file(directory, block), framework="pt") as file:
                metadata = file.metadata()
                groups = {str(name): int(number) for name, number in json.loads(metadata["groups"]).items()}
                return cls(block, int(metadata["start"]), groups, file.get_tensor("hidden"))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError):
            return None


def states_file(directory: Path, block: int) -> Path:
    """Return the path of the inputs of ``block`` in ``directory``."""
    return directory / f"hidden-{block}.safetensors"


def saved_blocks(directory: Path) -> list[int]:
    """Return the blocks whose inputs are in ``directory``, the last first."""
    return sorted((int(found[1]) for file in directory.iterdir() if (found := NAME.fullmatch(file.name))), reverse=True)


def remove_states(directory: Path) -> None:
    """Remove all saved states from ``directory``."""
    for block in saved_blocks(directory):
        states_file(directory, block).unlink(missing_ok=True)


def joined(chunks: Sequence[Tensor]) -> Tensor:
    """Return chunks (n, T, D) of hidden states as one tensor on the CPU."""
    return torch.cat([chunk.cpu() for chunk in chunks])
