"""Healing of block scales: d and dmin of every packed block take another fp16 value, which costs no bytes.

Integers and sub-block codes stay. A scale is tuned by a multiplier of what the bank stores; gradients pass its rounding
to fp16 as if it were not rounded (Bengio et al. 2013). Tuning the scales alone of a quantized model is the second phase
of EfficientQAT (Chen et al. 2024, arXiv 2407.11062). Shapes: n blocks of a tensor, u scales of a block.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from evaluators.model.block_model import BlockModel
from evaluators.prepare.bank import Bank
from quantizers.formats.block_scales import block_scales, scale_gradients, scales_of_block, with_block_scales
from quantizers.formats.table import QuantFormat

PREFIX = "scales:"  # of the names of multipliers, followed by the tensor's name

Formats = Mapping[str, QuantFormat | None]


def scales_name(tensor: str) -> str:
    """Return the name under which the multipliers of a tensor's scales are tuned."""
    return f"{PREFIX}{tensor}"


def divided(values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the float tensors among tuned ``values`` by name, and the multipliers of scales by their tensor's name."""
    floats = {name: value for name, value in values.items() if not name.startswith(PREFIX)}
    return floats, {name.removeprefix(PREFIX): value for name, value in values.items() if name not in floats}


def multipliers(bank: Bank, formats: Formats) -> dict[str, Tensor]:
    """Return multipliers of 1, float32 (n, u), by the names under which they are tuned, of all that has scales."""
    shapes = {name: (bank.blocks(name, fmt), scales_of_block(fmt)) for name, fmt in formats.items() if fmt}
    return {scales_name(name): torch.ones(shape) for name, shape in shapes.items() if shape[1]}


def scaled(fmt: QuantFormat, data: Tensor, factors: Tensor) -> Tensor:
    """Return the bytes ``data`` uint8 (rows, row_bytes) whose scales are multiplied by ``factors`` (n, u)."""
    scales = block_scales(fmt, data)
    return with_block_scales(fmt, data, (scales.float() * factors.to(data.device)).half())


class ScaledBank(Bank):
    """A bank that multiplies the scales of some tensors, whatever their format; ``factors`` (n, u) are by tensor."""

    def __init__(self, directory: Path, factors: Mapping[str, Tensor]):
        super().__init__(directory)
        self._factors = factors

    def packed(self, tensor: str, fmt: QuantFormat) -> Tensor:
        """Return the bytes uint8 (rows, row_bytes) of the GGUF file; see ``Bank``."""
        data, factors = super().packed(tensor, fmt), self._factors.get(tensor)
        return data if factors is None else scaled(fmt, data, factors)


@contextmanager
def scaled_weights(model: BlockModel, bank: Bank, formats: Formats, factors: Mapping[str, Tensor]) -> Iterator[None]:
    """Set loaded tensors to weights with scales multiplied by ``factors`` (n, u), by tensor, in the context."""
    tuned = ScaledBank(bank.directory, factors)
    originals = {name: model.weight(name).data for name in factors}
    try:
        for name, original in originals.items():
            weights = tuned.weights(name, format_of(formats, name), original.shape[-1], model.device)
            model.weight(name).data = weights.to(original.dtype)
        yield
    finally:
        for name, original in originals.items():
            model.weight(name).data = original


@contextmanager
def scale_gradients_of(
    model: BlockModel, bank: Bank, formats: Formats, factors: Mapping[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that a backward pass fills with the gradients in ``factors`` (n, u), which are by tensor.

    They are on the CPU, by the names under which factors are tuned. The tensors' weights are loaded, with these
    factors; the gradient of a weight is freed as soon as that of its factors is there.
    """
    gradients = {scales_name(name): torch.zeros_like(own, device="cpu") for name, own in factors.items()}

    def adding(name: str) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            fmt = format_of(formats, name)
            data = bank.packed(name, fmt).to(parameter.device)
            found = scale_gradients(fmt, data, parameter.grad) * block_scales(fmt, data).float()
            gradients[scales_name(name)] += found.cpu()
            parameter.grad = None

        return add

    parameters = {name: model.weight(name).requires_grad_(True) for name in factors}
    handles = [own.register_post_accumulate_grad_hook(adding(name)) for name, own in parameters.items()]
    try:
        yield gradients
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None


def format_of(formats: Formats, tensor: str) -> QuantFormat:
    """Return the format of a packed tensor."""
    fmt = formats[tensor]
    assert fmt is not None, "only packed tensors have scales"
    return fmt
