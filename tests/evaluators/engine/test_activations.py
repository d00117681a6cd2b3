"""Simulated 8-bit inputs reach exactly the quantized linears."""

import torch

from evaluators.engine.activations import EightBitInputs, straight_through
from evaluators.engine.evaluator import GenomeEvaluator
from evaluators.model.block_model import BlockModel
from quantizers.formats.activations import quantized_input
from quantizers.formats.table import FORMATS, QuantFormat
from search.types import Fidelity
from tests.conftest import SmallBank

CPU = torch.device("cpu")
FIDELITY = Fidelity("search", 512)


def test_a_pass_with_eight_bit_inputs_is_the_products_written_out(small_bank: SmallBank) -> None:
    model = BlockModel(small_bank.folder, CPU)
    model.load_all()
    block, x = model.blocks[0], torch.randn(2, 8, 256, generator=torch.Generator().manual_seed(0))
    formats: dict[str, QuantFormat | None] = {
        f"model.layers.0.mlp.{n}_proj.weight": FORMATS["Q4_K"] for n in ("gate", "up")
    }
    formats["model.layers.0.mlp.down_proj.weight"] = FORMATS["Q8_0"]
    plain = block.mlp(x)
    inputs = EightBitInputs(model, formats)
    read = quantized_input("Q8_K", x)
    inner = torch.nn.functional.silu(read @ block.mlp.gate_proj.weight.T) * (read @ block.mlp.up_proj.weight.T)
    expected = quantized_input("Q8_0", inner) @ block.mlp.down_proj.weight.T
    assert torch.equal(block.mlp(x), expected) and not torch.equal(expected, plain)
    formats.clear()
    assert torch.equal(block.mlp(x), plain)
    assert torch.equal(inputs.head_input(x), x)


def test_only_quantized_tensors_read_eight_bits(small_bank: SmallBank) -> None:
    setup = small_bank.setup()
    float_inputs = GenomeEvaluator(setup)
    eight_bits = GenomeEvaluator(type(setup)(**{**vars(setup), "activations": "q8", "key": "q8"}))
    states = [e.sweep.final_states(e.ids(FIDELITY), "text", [{}])[0] for e in (float_inputs, eight_bits)]
    assert torch.equal(*states)
    losses = [e.evaluate([small_bank.space.largest()], FIDELITY)[0].kl for e in (float_inputs, eight_bits)]
    assert losses[0] < losses[1] < losses[0] + 1e-3


def test_gradients_pass_the_rounding_as_if_it_were_not_there() -> None:
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    free, weight = x.clone().requires_grad_(True), torch.linspace(-1, 1, 256)
    rounded = straight_through("Q8_K", free)
    (rounded * weight).sum().backward()
    assert free.grad is not None and torch.equal(free.grad, weight.expand(4, 256))
    assert torch.allclose(rounded, quantized_input("Q8_K", x), rtol=1e-6, atol=1e-7)
    assert torch.equal(straight_through("Q8_K", x), quantized_input("Q8_K", x))
