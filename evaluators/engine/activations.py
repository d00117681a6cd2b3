"""This module rounds inputs of quantized linear layers to llama.cpp's 8-bit blocks, in a model that runs in floats."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from evaluators.model.block_model import BlockModel
from quantizers.formats.activations import input_type, quantized_input
from quantizers.formats.table import QuantFormat


def straight_through(kind: str, x: Tensor) -> Tensor:
    """Return ``x`` rounded to blocks of ``kind``, a result of ``quantizers.formats.activations.input_type``.

    Gradients pass as if it were not rounded (Bengio et al. 2013, section 2.3).
    """
    if not x.requires_grad:
        return quantized_input(kind, x.float())
    return x + (quantized_input(kind, x.detach()) - x.detach())


class EightBitInputs:
    """Hooks the linear layers of ``model`` so that those whose weight has a format in ``formats`` read 8-bit inputs.

    ``formats``, by Hugging Face name, is read at every pass, so its owner may change it. An input that several layers
    read is rounded once.
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
        """Return the final hidden states (..., D), rounded if the head's weight has a format."""
        fmt = self._formats.get(self._head)
        return hidden if fmt is None else straight_through(input_type(fmt), hidden)
