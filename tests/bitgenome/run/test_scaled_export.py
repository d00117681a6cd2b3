"""The file of a scaled model is the original function to llama.cpp, and passes the proof."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.float_gguf import export_float
from bitgenome.common.errors import UserError
from bitgenome.config.run import parse_config
from bitgenome.run.proof import prove
from evaluators.model.folder import ModelFolder
from evaluators.prepare.input_group import group_file
from evaluators.prepare.scaling import ScaleGroup, write_scaled_model
from exporters.files.gguf_writer import export_gguf
from exporters.files.packed_file import PackedFile
from exporters.metadata.tensor_names import quantizable_tensors
from exporters.runtime.llamacpp import LlamaCppRuntime
from quantizers.formats.table import FORMATS
from quantizers.settings import CompensationSettings, ScalingSettings
from tests import ggml_reference
from tests.bitgenome.conftest import SMALL
from tests.conftest import SmallBank
from tests.exporters.conftest import relative_error, transformers_hidden

SETTINGS = ScalingSettings(kind="smoothquant", protect=0.01)


@pytest.fixture(scope="module")
def view(small_bank: SmallBank, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """The embedded model with the inputs of its first block scaled."""
    directory = tmp_path_factory.mktemp("scaled")
    groups = small_bank.groups[:4]
    for group in groups:
        ScaleGroup(
            small_bank.folder.path, group_file(small_bank.directory, group), directory, SETTINGS, CompensationSettings()
        ).run({})
    return write_scaled_model(small_bank.folder, directory, groups)


def test_llamacpp_computes_the_original_function(view: ModelFolder, small_bank: SmallBank, tmp_path: Path) -> None:
    export_float(view, tmp_path / "f32.gguf")
    windows = small_bank.windows.windows["test"][:2]
    with LlamaCppRuntime(tmp_path / "f32.gguf", windows.shape[1], threads=1) as runtime:
        found = runtime.hidden_states(windows)
    assert relative_error(found, transformers_hidden(small_bank.folder, windows)) < 1e-5


def test_the_quantized_file_passes_the_proof(view: ModelFolder, small_bank: SmallBank, tmp_path: Path) -> None:
    fmt = FORMATS["Q6_K"]
    packed = {name: ggml_reference.quantize(fmt, view.read(name).float()) for name in quantizable_tensors(view)}
    export_gguf(view, lambda name: (fmt, packed[name].numpy()), tmp_path / "q6.gguf")
    file = PackedFile(tmp_path / "q6.gguf", view)
    assert file.formats.keys() == packed.keys()
    for name, data in packed.items():
        assert torch.equal(file.weights(name), ggml_reference.dequantize(fmt, data))
    text = replace(small_bank.windows, windows={"test": small_bank.windows.windows["test"][:8]})
    proof = prove(tmp_path / "q6.gguf", view, text, "q8")
    assert proof.eight_bit_to_runtime_kl is not None
    assert proof.simulated_kl < 2e-3
    assert proof.eight_bit_to_runtime_kl < 0.8 * proof.simulated_to_runtime_kl < 1e-3


@pytest.mark.parametrize(
    ("key", "value"), [("kind", "awk"), ("alpha", 1.5), ("grid", 0), ("protect", 1.0), ("protects", 0.1)]
)
def test_a_wrong_setting_is_refused_in_one_sentence(key: str, value: object) -> None:
    settings = {"name": "bad", **SMALL, "quantization": {"scaling": {key: value}}}
    with pytest.raises(UserError, match=f"quantization.scaling.{key}") as refusal:
        parse_config(settings, "here.yaml")
    assert "\n" not in str(refusal.value)
