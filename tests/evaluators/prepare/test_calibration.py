"""Hessians are those of the full-precision model's own inputs, one for each input."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evaluators.model.folder import ModelFolder, ModelFolderError
from evaluators.prepare.calibration import calibrate
from evaluators.prepare.input_group import InputGroup, group_file
from quantizers.formats.table import FORMATS
from quantizers.rounding.sparsegpt import compensate
from tests.conftest import EMBEDDED, SmallBank
from tests.small_models import save_small_model

FIRST, SECOND = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"


def inputs_of(model: torch.nn.Module, name: str, ids: torch.Tensor) -> torch.Tensor:
    """float64 (tokens, columns) that a module reads in a plain forward of (n, T) token ids."""
    seen: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        model(ids)
    return seen[0].flatten(0, 1).double()


def test_tensors_that_read_the_same_input_share_one_hessian(small_bank: SmallBank) -> None:
    groups = [InputGroup.load(group_file(small_bank.directory, name)) for name in small_bank.groups]
    first = [tuple(name.removeprefix("model.layers.0.") for name in group.tensors) for group in groups[:4]]
    assert first == [
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        ("self_attn.o_proj.weight",),
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        ("mlp.down_proj.weight",),
    ]
    assert sorted(name for group in groups for name in group.tensors) == sorted(g.name for g in small_bank.space.genes)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj", "model.layers.4.self_attn.q_proj"])
def test_hessians_equal_those_of_a_plain_forward_in_float64(name: str, small_bank: SmallBank) -> None:
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    x = inputs_of(model, name, torch.from_numpy(small_bank.windows.windows["calibration"]))
    expected = x.T @ x / len(x)
    found = InputGroup.load(group_file(small_bank.directory, name)).hessian.double()
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_calibration_gives_the_same_hessians_twice() -> None:
    windows = torch.arange(512).reshape(2, 256)
    first, second = (list(calibrate(ModelFolder(EMBEDDED), windows, torch.device("cpu"))) for _ in range(2))
    assert all(torch.equal(a.hessian, b.hessian) for a, b in zip(first, second, strict=True))


def test_nothing_is_measured_of_what_only_tensors_that_are_not_searched_read() -> None:
    folder, device, windows = ModelFolder(EMBEDDED), torch.device("cpu"), torch.arange(64).reshape(1, 64)
    attention = "model.layers.0.self_attn."
    left_out = {f"{attention}o_proj.weight", f"{attention}q_proj.weight"}
    every = {group.name: group for group in calibrate(folder, windows, device)}
    some = {group.name: group for group in calibrate(folder, windows, device, left_out=left_out)}
    assert every.keys() - some.keys() == {f"{attention}o_proj", f"{attention}q_proj"}
    assert some.keys() - every.keys() == {f"{attention}k_proj"}  # the next to read what q reads
    assert torch.equal(some[f"{attention}k_proj"].hessian, every[f"{attention}q_proj"].hessian)
    assert not left_out & {tensor for group in some.values() for tensor in group.tensors}


def test_moments_equal_those_of_a_plain_forward_in_float64(small_bank: SmallBank) -> None:
    name = "model.layers.0.mlp.down_proj"
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    x = inputs_of(model, name, torch.from_numpy(small_bank.windows.windows["calibration"]))
    found = InputGroup.load(group_file(small_bank.directory, name)).statistics
    for measured, expected in (
        (found.mean, x.mean(0)),
        (found.mean_abs, x.abs().mean(0)),
        (found.abs_max, x.abs().amax(0)),
        (found.mean_square, x.square().mean(0)),
        (found.variance, x.var(0, correction=0)),
    ):
        torch.testing.assert_close(measured.double(), expected, rtol=1e-4, atol=1e-6)


def test_activations_that_are_not_finite_name_the_tensor(tmp_path: Path) -> None:
    folder = save_small_model(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e30
    tensors["model.layers.1.mlp.gate_proj.weight"] *= 1e30
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelFolderError, match=r"not finite in the input of model\.layers\.1\.mlp\.down_proj\.weight"):
        list(calibrate(ModelFolder(folder), torch.arange(64).reshape(2, 32), torch.device("cpu")))


def test_sequential_calibration_sees_the_outputs_of_quantized_blocks() -> None:
    """The second block's inputs are those of a model whose first block is quantized; the first block's are the same."""
    windows, device = torch.arange(1024).reshape(4, 256), torch.device("cpu")
    parallel = {g.name: g for g in calibrate(ModelFolder(EMBEDDED), windows, device)}
    sequential = {g.name: g for g in calibrate(ModelFolder(EMBEDDED), windows, device, "W2")}
    assert torch.equal(parallel[FIRST].hessian, sequential[FIRST].hessian)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    for group in (g for name, g in parallel.items() if name.startswith("model.layers.0.")):
        weights = {name: model.get_parameter(name).data for name in group.tensors}
        for name, levels in compensate(weights, dict.fromkeys(weights, (FORMATS["Q2_K"],)), group.hessian).items():
            model.get_parameter(name).data = levels["Q2_K"].packed.dequantize()
    x = inputs_of(model, SECOND, windows)
    found = sequential[SECOND].hessian.double()
    assert (found - x.T @ x / len(x)).norm() < 1e-4 * found.norm()
    assert (found - parallel[SECOND].hessian.double()).norm() > 1e-2 * found.norm()
