"""Inputs of quantized linear layers in llama.cpp's 8-bit blocks, for a model that runs in floats."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from evaluators.model.block_model import BlockModel
from quantizers.formats.activations import input_type, quantized_input
from quantizers.formats.table import QuantFormat


def straight_through(kind: str, x: Tensor) -> Tensor:
    """``x`` in 8-bit blocks of ``kind``; gradients pass as if it were not rounded (Bengio et al. 2013, section 2.3)."""
    if not x.requires_grad:
        return quantized_input(kind, x.float())
    return x + (quantized_input(kind, x.detach()) - x.detach())


class EightBitInputs:
    """From now on every linear of ``model`` whose weight has a format in ``formats`` reads its input in 8 bits.

    ``formats`` is read at every pass, so its owner may change it. Linears that read one tensor share the work.
    """

    def __init__(self, model: BlockModel, formats: Mapping[str, QuantFormat | None]):
        self._formats = formats
        self._head = model.head_name
        self._last: tuple[Tensor, str, Tensor] | None = None
        for block in range(len(model.blocks)):
            for name, linear in model.linears(block):
                linear.register_forward_pre_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor] | None]:
        def quantize(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor] | None:
            fmt = self._formats.get(name)
            return None if fmt is None else (self._quantized(input_type(fmt), inputs[0]),)

        return quantize

    def _quantized(self, kind: str, x: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not x or self._last[1] != kind:
            self._last = (x, kind, straight_through(kind, x))
        return self._last[2]

    def head_input(self, hidden: Tensor) -> Tensor:
        """(..., D) final hidden states as the head's product reads them."""
        fmt = self._formats.get(self._head)
        return hidden if fmt is None else straight_through(input_type(fmt), hidden)
