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
from evaluators.prepare.bank import Bank, decoded
from quantizers.formats.block_scales import block_scales, scale_gradients, with_block_scales
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
    shapes = {name: block_scales(fmt, bank.packed(name, fmt)).shape for name, fmt in formats.items() if fmt}
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
def tunable_scales(
    model: BlockModel, bank: Bank, formats: Formats, factors: Mapping[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Set loaded tensors to the bank's weights with scales multiplied by ``factors`` (n, u), by tensor, until the exit.

    Yields a dict that a backward pass fills with the gradients in ``factors`` on the CPU, by the names under which they
    are tuned; a weight's own gradient is freed as soon as it is there.
    """
    gradients = {scales_name(name): torch.zeros_like(values, device="cpu") for name, values in factors.items()}
    parameters = {name: model.weight(name) for name in factors}
    originals = {name: parameter.data for name, parameter in parameters.items()}
    handles = []
    try:
        for name, parameter in parameters.items():
            fmt = formats[name]
            assert fmt is not None, "only packed tensors have scales"
            data = bank.packed(name, fmt).to(model.device)
            weights = decoded(fmt, scaled(fmt, data, factors[name]), parameter.shape[-1], model.device)
            parameter.data = weights.to(parameter.dtype)
            parameter.requires_grad_(True)
            handles.append(
                parameter.register_post_accumulate_grad_hook(_adding(fmt, data, gradients, scales_name(name)))
            )
        yield gradients
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in parameters.items():
            parameter.requires_grad_(False)
            parameter.data, parameter.grad = originals[name], None


def _adding(fmt: QuantFormat, data: Tensor, gradients: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    """Return a hook that turns a weight's gradient into that of its multipliers, and frees it."""

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        found = scale_gradients(fmt, data, parameter.grad) * block_scales(fmt, data).float()
        gradients[name] += found.cpu()
        parameter.grad = None

    return add
