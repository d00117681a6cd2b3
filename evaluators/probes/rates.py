"""This module defines the rates of a worker, from which the time of a run is forecast."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from quantizers.settings import Sparsity


@dataclass(frozen=True)
class Rounding:
    """Names one kind of input group: its columns, the candidate formats of its tensors, and how they are pruned.

    ``two_sided``: the rows of its tensors are rounded in steps.
    """

    columns: int
    formats: tuple[str, ...]
    sparsity: Sparsity | None = None
    two_sided: bool = False

    @property
    def key(self) -> str:
        """The kind as text."""
        pruned = f" {self.sparsity}" if self.sparsity else ""
        return f"{self.columns} {'+'.join(self.formats)}{pruned}{' two-sided' if self.two_sided else ''}"


class RoundingRate(NamedTuple):
    """Seconds for a column of a batch of ``rows`` rows, in all steps, and for a weight, both at all levels."""

    column: float
    weight: float
    rows: int


@dataclass(frozen=True)
class Rates:
    """Holds the seconds that one unit of each kind of work takes on one worker.

    Positions are those of text: a block's times are of one decoder block, forward or forward and backward, the head's
    of one candidate's logits and divergence. ``hessian`` is by columns of the input, in seconds a position.
    ``rounding`` is by ``Rounding.key``; ``factor`` is in seconds for the cube of the columns, ``decode`` for a weight
    at one level. ``block_calibration`` and ``hessian`` are with all cores.
    """

    device: str
    threads: int
    block: float  # in the compute type of the search
    block_float32: float
    block_gradient: float  # float32
    head: float
    head_gradient: float
    block_calibration: float
    hessian: dict[str, float]
    factor: float
    rounding: dict[str, RoundingRate]
    decode: float
    host_flops: float  # operations per second of the host, all cores, float32
    written: float = 0.0  # a block's for each of the windows that a model writes together; 0: the run writes none

    def to_json(self) -> dict[str, Any]:
        """Return the rates as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Rates":
        """Return the rates whose ``to_json`` is ``record``. Raises TypeError for other keys."""
        return cls(**{**record, "rounding": {kind: RoundingRate(*rate) for kind, rate in record["rounding"].items()}})
