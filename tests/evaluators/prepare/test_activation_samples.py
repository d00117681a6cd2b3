"""Samples are the model's own inputs at fixed positions; tensors are grouped by what their outputs share."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from evaluators.data.documents import TextError
from evaluators.prepare.activation_samples import SampleActivations, layer_series, sample_positions, sampled_input
from evaluators.prepare.bank import group_tensors
from evaluators.prepare.input_group import group_file
from quantizers.statistics.mutual_information import pairwise_information
from tests.conftest import EMBEDDED, SmallBank


@pytest.fixture(scope="module")
def samples(small_bank: SmallBank, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("samples")
    files = tuple(group_file(small_bank.directory, name) for name in small_bank.groups)
    SampleActivations(EMBEDDED, small_bank.windows_file, files, directory, 100).run({})
    return directory


def test_samples_are_inputs_of_a_plain_forward(samples: Path, small_bank: SmallBank) -> None:
    name = "model.layers.3.mlp.down_proj"
    rows, positions = sample_positions(32, 256, 100)
    ids = torch.from_numpy(small_bank.windows.windows["calibration"][:rows])
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        model(ids)
    expected = torch.cat(seen)[:, positions].flatten(0, 1)[:100]
    sampled = sampled_input(samples, name)
    assert sampled is not None
    found = sampled.inputs()
    assert found.shape == (100, 768)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_series_is_the_logarithm_of_the_outputs_norm(samples: Path, small_bank: SmallBank) -> None:
    groups = {name: group_tensors(group_file(small_bank.directory, name)) for name in small_bank.groups}
    names, series = layer_series(small_bank.folder, samples, groups)
    assert sorted(names) == sorted(gene.name for gene in small_bank.space.genes) and series.shape == (100, 43)
    name = "model.layers.2.self_attn.k_proj.weight"
    sampled = sampled_input(samples, "model.layers.2.self_attn.q_proj")
    assert sampled is not None
    outputs = sampled.inputs().double() @ small_bank.folder.read(name).double().T
    torch.testing.assert_close(series[:, names.index(name)].double(), outputs.norm(dim=1).log(), rtol=0, atol=1e-4)


def test_samples_spread_over_the_windows_and_never_exceed_the_text() -> None:
    rows, positions = sample_positions(192, 512, 2048)
    assert rows * len(positions) == 2048 and rows == 32
    assert positions[0] > 0 and positions[-1] < 512 and len(set(positions)) == 64
    rows, positions = sample_positions(4, 16, 64)
    assert (rows, positions) == (4, list(range(16)))
    with pytest.raises(TextError, match="expected at least 65 tokens of calibration text"):
        sample_positions(4, 16, 65)


def test_information_is_computed_once_and_kept_beside_the_samples(samples: Path) -> None:
    sampled = sampled_input(samples, "model.layers.0.self_attn.o_proj")
    assert sampled is not None
    first, seconds = sampled.information("histogram", 4)
    again, same_seconds = sampled.information("histogram", 4)
    assert torch.equal(first.information, again.information) and seconds == same_seconds
    direct = pairwise_information(sampled.inputs(), "histogram", 4)
    assert torch.equal(first.information, direct.information) and torch.equal(first.entropy, direct.entropy)
    assert sampled_input(samples, "nowhere") is None
