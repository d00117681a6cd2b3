"""This module collects the bytes of one tensor at all its levels, while its rows are rounded step by step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantizers.formats.packed_tensor import dequantize
from quantizers.formats.table import QuantFormat
from quantizers.rounding.codes import Codes
from quantizers.rounding.nearest import row_ranges
from quantizers.rounding.row_choice import Compensated, bytes_errors, compensated, row_power
from quantizers.rounding.row_order import RowOrder


class Levels:
    """Holds what the rows of W (rows, columns) aim at in every format, and the bytes of those that are rounded.

    Rows are rounded step by step. Further sweeps take each step's rows again, now that those after them are known.
    """

    def __init__(self, W: Tensor, formats: Sequence[QuantFormat], order: RowOrder):
        self.order = order
        self._W = W.float()
        self._formats = {fmt.name: fmt for fmt in formats}
        moving = [name for name, fmt in self._formats.items() if order.steps > 1 and not fmt.is_float]
        # what rows aim at in the first sweep, and the errors W - Q of the rows that are rounded
        self._targets = dict.fromkeys(self._formats, self._W) | {name: self._W.clone() for name in moving}
        self._data: dict[str, Tensor] = {}
        self._codes: dict[tuple[str, int], Codes] = {}
        self._errors: dict[str, float] = {}  # of formats whose rows aim at W itself

    def targets(self, sweep: int, step: int) -> dict[str, Tensor]:
        """Return what the rows of ``step`` aim at, float32 (n, columns), by format; float formats take one step."""
        order = self.order
        if step >= order.steps or (sweep and order.steps == 1):
            return {}
        found: dict[str, Tensor] = {}
        for name, fmt in self._formats.items():
            if fmt.is_float:
                found |= {} if sweep or step else {name: self._W}
            elif sweep:
                found[name] = order.taken(self._W, step) + order.answer(self._targets[name], step)
            else:
                found[name] = order.taken(self._targets[name], step)
        return found

    def data(self, name: str, step: int) -> Tensor:
        """Return the bytes uint8 (n, row_bytes) of the rows of ``step`` as they are."""
        return self.order.taken(self._data[name], step)

    def codes(self, name: str, step: int) -> Codes:
        """Return the codes of the rows of ``step`` as compensation left them."""
        return self._codes[name, step]

    def take(self, name: str, step: int, data: Tensor, errors: Tensor, codes: Codes | None) -> None:
        """Take the bytes uint8 (n, row_bytes) of the rows of ``step``, and move what later rows aim at.

        ``errors`` (n,) are those of the bytes under H.
        """
        fmt, order = self._formats[name], self.order
        if fmt.is_float or order.steps == 1:
            self._data[name], self._errors[name] = data, float(errors.sum())
            return
        first = (name, step) not in self._codes
        assert codes is not None, "rows are compensated where they are rounded in steps"
        self._codes[name, step] = codes
        if name not in self._data:
            self._data[name] = data.new_empty(len(self._W), data.shape[1])
        order.put(self._data[name], step, data)
        decoded = torch.cat([dequantize(fmt, data[rows]) for rows in row_ranges(order.taken(self._W, step))])
        if first:
            order.spread(self._targets[name], step, order.taken(self._targets[name], step) - decoded)
        order.put(self._targets[name], step, order.taken(self._W, step) - decoded)

    def result(self, H: Tensor) -> dict[str, Compensated]:
        """Return bytes and errors by format, once all rows are rounded; H is (columns, columns)."""
        power = row_power(self._W, H)
        found = {}
        for name, fmt in self._formats.items():
            data = self._data[name]
            error = self._errors.get(name)
            if error is None:
                error = float(bytes_errors(fmt, self._W, data, H).sum())
            found[name] = compensated(fmt, self._W, data, error, power)
        return found
