"""The tensors of a model, as stored or as the bank's bytes decode: kept as far as memory allows, else made again."""

from torch import Tensor

from evaluators.bank import Bank
from evaluators.block_model import BlockModel
from quantizers.formats import QuantFormat

WeightKey = tuple[str, QuantFormat | None]  # Hugging Face name and format; None: full precision


class ModelWeights:
    """Weights by name and format on the model's device.

    Up to ``capacity`` bytes stay once they were asked for, so a model that fits is resident; what does not fit is read
    and decoded again each time, so a model that does not is streamed. The first to come stay: blocks are asked for in a
    cycle, in which the least recently used one is always the next.
    """

    def __init__(self, model: BlockModel, bank: Bank, capacity: int):
        self.model = model
        self.bank = bank
        self.capacity = capacity
        self.kept_bytes = 0
        self._kept: dict[WeightKey, Tensor] = {}

    def get(self, name: str, fmt: QuantFormat | None) -> Tensor:
        """(rows, columns), or (columns,) of a norm or bias."""
        key = (name, fmt)
        if (kept := self._kept.get(key)) is not None:
            return kept
        weight = self._make(name, fmt)
        size = weight.numel() * weight.element_size()
        if self.kept_bytes + size <= self.capacity:
            self._kept[key] = weight
            self.kept_bytes += size
        return weight

    def rows(self, name: str, fmt: QuantFormat | None, rows: Tensor) -> Tensor:
        """(len(rows), columns): some rows of a matrix that may be too large to be here whole."""
        if (kept := self._kept.get((name, fmt))) is not None:
            return kept[rows.to(kept.device)]
        if fmt is None:
            return self.model.as_computed(self.model.folder.read(name)[rows.cpu()])
        return self.bank.rows(name, fmt, rows, self.model.folder.shapes[name][-1], self.model.device)

    def _make(self, name: str, fmt: QuantFormat | None) -> Tensor:
        if fmt is None:
            return self.model.as_computed(self.model.folder.read(name))
        return self.bank.weights(name, fmt, self.model.folder.shapes[name][-1], self.model.device)
