"""A full model in memory that takes the weights of any genome; only tensors whose format changes are decoded."""

from collections.abc import Mapping

import torch
from torch import Tensor

from evaluators.engine.activations import EightBitInputs
from evaluators.healing.scales import ScaledBank
from evaluators.model.block_model import BlockModel
from evaluators.prepare.bank import Bank
from quantizers.formats.table import QuantFormat

NO_FACTORS: Mapping[str, Tensor] = {}


class SimulatedModel:
    """A model, loaded whole, whose tensors can be set to any format of the bank or back to full precision (None).

    ``activations`` is "float", or "q8" to round the inputs of quantized tensors to 8-bit blocks as llama.cpp does.
    """

    def __init__(self, model: BlockModel, bank: Bank, activations: str = "float"):
        self.model = model
        self.bank = bank
        model.load_all()
        self._formats: dict[str, QuantFormat | None] = {}
        self._factors: dict[str, Tensor | None] = {}
        self._full: dict[str, Tensor] = {}
        self._inputs = EightBitInputs(model, self._formats) if activations == "q8" else None

    def set_formats(
        self, formats: Mapping[str, QuantFormat | None], factors: Mapping[str, Tensor] = NO_FACTORS
    ) -> None:
        """Set the tensors of ``formats``, by Hugging Face name, to these formats, and all others to full precision.

        The scales of the tensors in ``factors`` are multiplied by them; see ``evaluators.healing.scales``.
        """
        restored = {name: None for name, current in self._formats.items() if current and name not in formats}
        for name, fmt in {**restored, **formats}.items():
            wanted = factors.get(name)
            if self._formats.get(name) == fmt and _same(self._factors.get(name), wanted):
                continue
            parameter = self.model.weight(name)
            original = self._full.setdefault(name, parameter.data)
            parameter.data = original if fmt is None else self._decode(name, fmt, original.shape[-1], factors)
            self._formats[name], self._factors[name] = fmt, wanted

    def _decode(self, name: str, fmt: QuantFormat, columns: int, factors: Mapping[str, Tensor]) -> Tensor:
        with torch.inference_mode(False):  # no inference tensor, so that autograd can use it
            return ScaledBank(self.bank.directory, factors).weights(name, fmt, columns, self.model.device)

    def full_weight(self, name: str) -> Tensor:
        """Return the full-precision weight, whatever format is set."""
        return self._full.get(name, self.model.weight(name).data)

    def head_input(self, hidden: Tensor) -> Tensor:
        """Return final hidden states (..., D) as the head reads them, rounded if its weight is quantized under q8."""
        return self._inputs.head_input(hidden) if self._inputs else hidden


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))
