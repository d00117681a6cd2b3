"""The full model in memory with any genome's weights, decoded from the bank's bytes; only changed tensors move."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from evaluators.activations import EightBitInputs
from evaluators.bank import Bank
from evaluators.batches import BATCH_TOKENS
from evaluators.block_model import BlockModel
from quantizers.formats import QuantFormat
from search.types import Genome, SearchSpace


class SimulatedModel:
    """A resident model whose tensors can be set to any format of the bank, or back to full precision (None).

    ``activations``: float, or q8 for the 8-bit inputs that llama.cpp gives to quantized tensors.
    """

    def __init__(self, model: BlockModel, bank: Bank, activations: str = "float"):
        self.model = model
        self.bank = bank
        model.load_all()
        self._formats: dict[str, QuantFormat | None] = {}
        self._full: dict[str, Tensor] = {}
        self._inputs = EightBitInputs(model, self._formats) if activations == "q8" else None

    def set_formats(self, formats: Mapping[str, QuantFormat | None]) -> None:
        """Make exactly the tensors of ``formats`` quantized so; all others full precision."""
        restored = {name: None for name, current in self._formats.items() if current and name not in formats}
        for name, fmt in {**restored, **formats}.items():
            if self._formats.get(name) == fmt:
                continue
            parameter = self.model.weight(name)
            original = self._full.setdefault(name, parameter.data)
            parameter.data = original if fmt is None else self._decode(name, fmt, original.shape[-1])
            self._formats[name] = fmt

    def _decode(self, name: str, fmt: QuantFormat, columns: int) -> Tensor:
        with torch.inference_mode(False):  # a weight that gradients may pass, whoever asks for it
            return self.bank.weights(name, fmt, columns, self.model.device)

    def full_weight(self, name: str) -> Tensor:
        """The full-precision weight, whatever format is set."""
        return self._full.get(name, self.model.weight(name).data)

    def head_input(self, hidden: Tensor) -> Tensor:
        """Final hidden states (..., D) as the head reads them."""
        return self._inputs.head_input(hidden) if self._inputs else hidden


def chunked(run: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """``run`` over the rows of a (B, T, ...) tensor, BATCH_TOKENS positions at a time."""
    return torch.cat([run(chunk) for chunk in rows.split(max(1, BATCH_TOKENS // rows.shape[1]))])


@torch.inference_mode()
def final_hidden(model: BlockModel, ids: Tensor) -> Tensor:
    """(B, T) token ids -> (B, T, D) final hidden states of a loaded model."""
    return chunked(lambda rows: model.run_from(0, model.embed(rows)), ids)


def genome_formats(space: SearchSpace, genome: Genome) -> dict[str, QuantFormat]:
    """Format of every tensor that the genome decides."""
    return {
        tensor: gene.formats[choice]
        for gene, choice in zip(space.genes, genome, strict=True)
        for tensor in gene.tensors
    }
