"""Our encoders and decoders against ggml's C code and gguf's Python."""

import gguf.quants
import numpy as np
import pytest
import torch
from torch import Tensor

from quantizers.formats.codebooks import CODEBOOK_GRIDS
from quantizers.formats.packed_tensor import PackedTensor, dequantize
from quantizers.formats.table import FORMATS, QuantFormat
from quantizers.rounding.nearest import quantize
from tests import ggml_reference
from tests.quantizers.weights import EXTREME_ROWS, embedded_matrices, extreme_rows, heavy_tailed, skewed_importance

BLOCK_FORMATS = [f for f in FORMATS.values() if not f.is_float]
SAMPLE_ROWS = 256
all_block_formats = pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=lambda f: f.name)


def weighted_error(W: Tensor, decoded: Tensor, importance: Tensor) -> float:
    return float((importance.double() * (W.double() - decoded.double()).square()).sum())


@all_block_formats
@pytest.mark.parametrize("W", [heavy_tailed(24, 768), extreme_rows()], ids=["heavy-tailed", "extreme"])
def test_three_decoders_agree_bit_for_bit(fmt: QuantFormat, W: Tensor) -> None:
    data = quantize(fmt, W, skewed_importance(W.shape[1]))
    ours = dequantize(fmt, data)
    python = gguf.quants.dequantize(data.numpy(), fmt.ggml_type)
    assert np.array_equal(ours.numpy().view(np.uint32), python.view(np.uint32))
    c = ggml_reference.dequantize(fmt, data)
    assert torch.equal(ours.view(torch.int32), c.view(torch.int32))


@all_block_formats
def test_random_bytes_decode_as_in_ggml(fmt: QuantFormat) -> None:
    data = torch.randint(
        0, 256, (64, 3 * fmt.block_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    ours, c = dequantize(fmt, data), ggml_reference.dequantize(fmt, data)
    assert torch.equal(ours.nan_to_num(7.0), c.nan_to_num(7.0))


@all_block_formats
@pytest.mark.parametrize("W", [heavy_tailed(24, 768), extreme_rows()], ids=["heavy-tailed", "extreme"])
def test_ggml_accepts_the_bytes(fmt: QuantFormat, W: Tensor) -> None:
    data = quantize(fmt, W)
    assert data.dtype == torch.uint8
    assert data.shape == (len(W), fmt.row_bytes(W.shape[1]))
    assert ggml_reference.is_valid(fmt, data)


@all_block_formats
@pytest.mark.parametrize("skewed", [True, False], ids=["skewed importance", "all alike"])
def test_error_is_at_most_ggmls(fmt: QuantFormat, skewed: bool) -> None:
    W = heavy_tailed(SAMPLE_ROWS, 512)
    importance = skewed_importance(512) if skewed else torch.ones(512)
    ours = weighted_error(W, dequantize(fmt, quantize(fmt, W, importance)), importance)
    theirs = weighted_error(W, dequantize(fmt, ggml_reference.quantize(fmt, W, importance)), importance)
    assert ours <= theirs


@all_block_formats
@pytest.mark.skipif(not embedded_matrices(), reason="the embedded model has not been trained")
def test_error_is_at_most_ggmls_on_a_trained_model(fmt: QuantFormat) -> None:
    for name, W in embedded_matrices().items():
        sample = W[:: max(1, len(W) // (32 if fmt.name in CODEBOOK_GRIDS else 128))]
        importance = skewed_importance(sample.shape[1])
        ours = weighted_error(sample, dequantize(fmt, quantize(fmt, sample, importance)), importance)
        theirs = ggml_reference.dequantize(fmt, ggml_reference.quantize(fmt, sample, importance))
        assert ours <= 1.01 * weighted_error(sample, theirs, importance), name


@all_block_formats
@pytest.mark.parametrize("row", EXTREME_ROWS, ids=str)
def test_extreme_rows_are_at_most_five_percent_worse_than_ggmls(fmt: QuantFormat, row: str) -> None:
    W = EXTREME_ROWS[row][None]
    ones = torch.ones(256)
    theirs = ggml_reference.dequantize(fmt, ggml_reference.quantize(fmt, W, ones))
    ours = weighted_error(W, dequantize(fmt, quantize(fmt, W)), ones)
    assert np.isfinite(ours)
    if theirs.isfinite().all():
        fp16_rounding = W.numel() * float(W.abs().max() * 2**-11) ** 2  # relative error of d or dmin, at most
        assert ours <= 1.05 * weighted_error(W, theirs, ones) + fp16_rounding


@all_block_formats
def test_decoded_weights_lose_almost_nothing_when_encoded_again(fmt: QuantFormat) -> None:
    W = heavy_tailed(64, 512)
    once = dequantize(fmt, quantize(fmt, W))
    twice = dequantize(fmt, quantize(fmt, once))
    assert (twice - once).square().sum() < 0.01 * (once - W).square().sum()


@all_block_formats
def test_zeros_stay_zero(fmt: QuantFormat) -> None:
    assert not dequantize(fmt, quantize(fmt, torch.zeros(2, 256))).any()


@all_block_formats
def test_each_row_is_encoded_by_itself(fmt: QuantFormat) -> None:
    W, importance = heavy_tailed(300, 512), skewed_importance(512)
    together = quantize(fmt, W, importance)
    assert torch.equal(together[7:8], quantize(fmt, W[7:8], importance))
    assert torch.equal(together[290:], quantize(fmt, W[290:], importance))


@all_block_formats
def test_encoding_does_not_depend_on_the_scale_of_importance(fmt: QuantFormat) -> None:
    W, importance = heavy_tailed(8, 512), skewed_importance(512)
    assert torch.equal(quantize(fmt, W, importance), quantize(fmt, W, importance * 2.0**40))


@all_block_formats
def test_columns_without_importance_are_still_encoded(fmt: QuantFormat) -> None:
    W, importance = heavy_tailed(8, 512), skewed_importance(512)
    importance[100:400] = 0
    decoded = dequantize(fmt, quantize(fmt, W, importance))
    assert (W - decoded)[:, 100:400].square().mean() < 0.3 * W[:, 100:400].square().mean()


@pytest.mark.parametrize("name", ["F16", "F32"])
def test_float_formats_are_plain_copies(name: str) -> None:
    W = heavy_tailed(3, 40)
    decoded = dequantize(FORMATS[name], quantize(FORMATS[name], W))
    assert torch.equal(decoded, W.half().float() if name == "F16" else W)


def test_packed_tensor_decodes_itself() -> None:
    W = heavy_tailed(4, 256)
    packed = PackedTensor(FORMATS["Q6_K"], quantize(FORMATS["Q6_K"], W), (4, 256))
    assert packed.dequantize().shape == packed.shape


@pytest.mark.parametrize(
    ("W", "importance", "message"),
    [
        (torch.zeros(2, 80), None, r"row size \(80\) is not a multiple of Q4_K block size \(256\)"),
        (torch.zeros(256), None, r"expected weights \(rows, columns\)"),
        (torch.full((1, 256), torch.nan), None, "256 non-finite values of 256"),
        (torch.zeros(1, 256), torch.ones(3), r"importance of shape \(256,\), got \(3,\)"),
        (torch.zeros(1, 256), -torch.ones(256), "not negative"),
    ],
)
def test_bad_input_is_named(W: Tensor, importance: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(FORMATS["Q4_K"], W, importance)


def test_weights_beyond_f16_are_refused() -> None:
    with pytest.raises(ValueError, match="more than F16 can hold"):
        quantize(FORMATS["F16"], torch.full((1, 2), 1e6))


def test_partial_blocks_are_not_decoded() -> None:
    with pytest.raises(ValueError, match=r"143 bytes is not a multiple of Q4_K"):
        dequantize(FORMATS["Q4_K"], torch.zeros(1, 143, dtype=torch.uint8))
