"""This module defines rules that set the target bits of tensors by name and by half of the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LayerRule:
    """A LayerRule sets target ``bits`` for tensors whose name contains ``match``, in the given half of the blocks."""

    bits: float
    match: str = ""
    half: Literal["first", "second", "both"] = "both"

    def fits(self, tensor: str, block: int, blocks: int) -> bool:
        """Return whether the rule applies to ``tensor`` of block number ``block``, from 0, of ``blocks``.

        A tensor outside of the blocks (block < 0 or >= blocks) is in neither half.
        """
        if self.match not in tensor:
            return False
        if self.half == "both":
            return True
        return 0 <= block < blocks and (2 * block < blocks) == (self.half == "first")


def target_bits(rules: Sequence[LayerRule], tensor: str, block: int, blocks: int, otherwise: float) -> float:
    """Return the bits of the first rule that applies to ``tensor``, else ``otherwise``."""
    return next((rule.bits for rule in rules if rule.fits(tensor, block, blocks)), otherwise)
