"""Eight-bit inputs are those of ggml's C code."""

import pytest
import torch

from quantizers.formats.activations import input_type, quantized_input
from quantizers.formats.table import FORMATS
from tests import ggml_reference
from tests.quantizers.weights import heavy_tailed

REFERENCES = {"Q8_K": ("q8_K", 292), "Q8_0": ("q8_0", 34)}  # ggml's name, bytes of a block


def inputs() -> torch.Tensor:
    x = heavy_tailed(64, 1024) * torch.linspace(-6, 6, 64).exp()[:, None]
    x[3] = 0
    x[5, 256:512] = 0
    return x


@pytest.mark.parametrize("kind", REFERENCES)
def test_inputs_are_those_of_ggml(kind: str) -> None:
    x = inputs()
    name, block_bytes = REFERENCES[kind]
    expected = ggml_reference.round_trip(name, block_bytes, x)
    assert torch.allclose(quantized_input(kind, x), expected, rtol=4e-7, atol=0)  # the library's 1 / x has 22 bits


@pytest.mark.parametrize(
    ("format_name", "kind"),
    [("Q2_K", "Q8_K"), ("Q6_K", "Q8_K"), ("Q8_0", "Q8_0"), ("Q4_0", "Q8_0"), ("F16", "F16"), ("F32", "F32")],
)
def test_the_type_of_the_inputs_follows_the_weights(format_name: str, kind: str) -> None:
    assert input_type(FORMATS[format_name]) == kind


def test_floats_are_only_rounded_to_their_own_type() -> None:
    x = heavy_tailed(4, 64)
    assert torch.equal(quantized_input("F32", x), x)
    assert torch.equal(quantized_input("F16", x), x.half().float())
