"""Scales of packed blocks are found where ggml keeps them, and a loss's gradient in them is exact."""

import pytest
import torch
from torch import Tensor

from quantizers.formats.block_scales import block_scales, scale_gradients, with_block_scales
from quantizers.formats.packed_tensor import dequantize
from quantizers.formats.table import FORMATS, QuantFormat
from quantizers.rounding.nearest import quantize
from tests import ggml_reference

ROWS, COLUMNS = 3, 512
block_formats = pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if not f.is_float], ids=lambda f: f.name)


def packed(fmt: QuantFormat) -> Tensor:
    return quantize(fmt, torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)))


@block_formats
def test_twice_the_scales_are_twice_the_weights_by_ggml(fmt: QuantFormat) -> None:
    data = packed(fmt)
    scales = block_scales(fmt, data)
    assert scales.shape[0] == ROWS * COLUMNS // fmt.block_size and scales.shape[1] in (1, 2)
    assert torch.equal(with_block_scales(fmt, data, scales), data)
    doubled = with_block_scales(fmt, data, 2 * scales)
    assert torch.equal(ggml_reference.dequantize(fmt, doubled), 2 * ggml_reference.dequantize(fmt, data))


@block_formats
def test_gradients_are_those_of_float64_differences(fmt: QuantFormat) -> None:
    data = packed(fmt)
    scales = block_scales(fmt, data)
    gradient = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    found = scale_gradients(fmt, data, gradient)
    weights = dequantize(fmt, data).double()
    for index in range(scales.shape[1]):
        changed = scales.clone()
        changed[:, index] *= 2
        moved = (dequantize(fmt, with_block_scales(fmt, data, changed)).double() - weights) * gradient
        expected = moved.view(len(scales), -1).sum(1)
        torch.testing.assert_close(found[:, index].double() * scales[:, index], expected, rtol=1e-4, atol=1e-4)


def test_rows_go_through_in_parts_and_may_be_shorter_than_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = FORMATS["Q4_K"]
    data, gradient = packed(fmt), torch.randn(ROWS, COLUMNS)
    whole = scale_gradients(fmt, data, gradient)
    monkeypatch.setattr("quantizers.formats.block_scales.GRADIENT_WEIGHTS", COLUMNS)
    assert torch.equal(scale_gradients(fmt, data, gradient), whole)
    shorter = torch.cat([gradient[:, :300], torch.zeros(ROWS, 212)], 1)
    assert torch.equal(scale_gradients(fmt, data, gradient[:, :300]), scale_gradients(fmt, data, shorter))


def test_float_types_have_no_scales() -> None:
    data = packed(FORMATS["F16"])
    assert block_scales(FORMATS["F16"], data).numel() == 0
    assert torch.equal(with_block_scales(FORMATS["F16"], data, block_scales(FORMATS["F16"], data)), data)
