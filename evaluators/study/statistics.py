"""Statistics of how a method spreads its bits: channels by level and layer, averages, ranges of importance."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

from evaluators.study.layer import LayerRecord


@dataclass(frozen=True)
class AllocationStatistics:
    """Summarizes how one method spread its bits over the layers."""

    method: str
    layers: tuple[LayerRecord, ...]

    @property
    def channels(self) -> dict[int, int]:
        """Number of channels in all layers by bits, fewest bits first."""
        total: Counter[int] = Counter()
        for layer in self.layers:
            total.update(layer.channels)
        return dict(sorted(total.items()))

    @property
    def average_bits(self) -> float:
        """Average bits per weight, without scales and zeros."""
        return sum(r.average_bits * r.weights for r in self.layers) / sum(r.weights for r in self.layers)

    @property
    def shares(self) -> str:
        """Percentages of the channels by bits, e.g. ``2: 20 %, 4: 80 %``."""
        return shares_of(self.channels)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per layer and level: method, tensor, bits, channels, percent, and the layer's own figures."""
        return pd.DataFrame(
            [
                {
                    "method": self.method,
                    "tensor": layer.tensor,
                    "bits": bits,
                    "channels": count,
                    "percent": 100 * count / sum(layer.channels.values()),
                    "average_bits": layer.average_bits,
                    "importance_min": layer.importance_min,
                    "importance_max": layer.importance_max,
                    "relative_error": layer.error / layer.power if layer.power else 0.0,
                }
                for layer in self.layers
                for bits, count in sorted(layer.channels.items())
            ]
        )


def shares_of(channels: dict[int, int]) -> str:
    """Return the percentages of ``channels`` (counts by bits) as text, e.g. ``2: 20 %, 4: 80 %``."""
    total = sum(channels.values())
    return ", ".join(f"{bits}: {100 * count / total:.0f} %" for bits, count in sorted(channels.items()))


def all_frames(statistics: Iterable[AllocationStatistics]) -> pd.DataFrame:
    """Return the rows of all methods in one table; see ``AllocationStatistics.to_frame``."""
    frames: Sequence[pd.DataFrame] = [one.to_frame() for one in statistics]
    return pd.concat(frames, ignore_index=True)
