"""Settings that differ by layer: targets in bits by the kind of a tensor and by its half of the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LayerRule:
    """``bits`` for tensors whose name contains ``match``, in the given half of the blocks."""

    bits: float
    match: str = ""
    half: Literal["first", "second", "both"] = "both"

    def fits(self, tensor: str, block: int, blocks: int) -> bool:
        """Whether the rule is for ``tensor``; one outside of the blocks (block < 0 or >= blocks) is in no half."""
        if self.match not in tensor:
            return False
        if self.half == "both":
            return True
        return 0 <= block < blocks and (2 * block < blocks) == (self.half == "first")


def target_bits(rules: Sequence[LayerRule], tensor: str, block: int, blocks: int, otherwise: float) -> float:
    """Bits of the first rule that fits, else ``otherwise``."""
    return next((rule.bits for rule in rules if rule.fits(tensor, block, blocks)), otherwise)
