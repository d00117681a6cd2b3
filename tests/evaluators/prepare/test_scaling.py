"""A scaled model is the same function with other weights."""

import json
from pathlib import Path

import pytest
import torch

from bitgenome.common import layout
from evaluators.data.windows import TokenWindows
from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder, ModelFolderError
from evaluators.model.scaled_view import COLUMNS, ROWS, write_scaled_view
from evaluators.prepare.calibration import Calibrate, calibrate
from evaluators.prepare.input_group import InputGroup, group_file
from evaluators.prepare.scaling import (
    SCALABLE,
    ScaleGroup,
    check_scalable,
    folded_factors,
    producer_of,
    scaling_done,
    scaling_record,
    view_done,
    write_scaled_model,
)
from quantizers.settings import CompensationSettings, ScalingSettings
from tests.small_models import save_small_model

CPU = torch.device("cpu")
IDS = torch.randint(0, 500, (4, 32), generator=torch.Generator().manual_seed(0))


def scale(path: Path, folder: Path, settings: ScalingSettings) -> tuple[ModelFolder, list[str], Path, Path]:
    """(scaled model, groups, calibration directory, scaling directory)"""
    calibration, directory = path / "calibration", path / "scaling"
    for made in (calibration, directory):
        made.mkdir(parents=True, exist_ok=True)
    (path / "windows").write_bytes(TokenWindows({"calibration": IDS.numpy()}, "").to_bytes())
    groups = list(Calibrate(folder, path / "windows", calibration).run({}))
    for group in groups:
        ScaleGroup(folder, group_file(calibration, group), directory, settings, CompensationSettings()).run({})
    return write_scaled_model(ModelFolder(folder), directory, groups), groups, calibration, directory


@torch.inference_mode()
def logits(folder: ModelFolder) -> torch.Tensor:
    model = BlockModel(folder, CPU)
    model.load_all()
    return model.head(model.run_from(0, model.embed(IDS)))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("model_type", SCALABLE)
def test_scaling_leaves_the_function_as_it_was(model_type: str, tmp_path: Path) -> None:
    tied = model_type in ("llama", "qwen3")
    folder = save_small_model(tmp_path / "m", model_type, tie_word_embeddings=tied)
    view, *_ = scale(tmp_path, folder, ScalingSettings(kind="smoothquant", alpha=0.5, protect=0.05))
    original = ModelFolder(folder)
    assert relative(logits(view), logits(original)) <= 1e-5
    changed = [name for name in original.shapes if not torch.equal(view.read(name), original.read(name))]
    assert sum(name.endswith("_proj.weight") for name in changed) == 14
    assert ("lm_head.weight" in changed) is not tied
    assert not [name for name in changed if "q_norm" in name or "k_norm" in name or "embed_tokens" in name]
    assert view.name == original.name and view.digest != original.digest


def test_biases_of_the_scaled_linears_are_scaled_with_their_rows(tmp_path: Path) -> None:
    folder = save_small_model(tmp_path / "m", "llama", num_hidden_layers=1, attention_bias=True, mlp_bias=True)
    view, *_ = scale(tmp_path, folder, ScalingSettings(kind="smoothquant"))
    original = ModelFolder(folder)
    assert relative(logits(view), logits(original)) <= 1e-5
    for linear in ("self_attn.v_proj", "mlp.up_proj"):
        bias = f"model.layers.0.{linear}.bias"
        assert not torch.equal(view.read(bias), original.read(bias))
    assert torch.equal(
        view.read("model.layers.0.mlp.gate_proj.bias"), original.read("model.layers.0.mlp.gate_proj.bias")
    )


def test_the_scaled_model_has_the_scaled_hessians_without_a_second_calibration(tmp_path: Path) -> None:
    folder = save_small_model(tmp_path / "m", "qwen2", num_hidden_layers=1, tie_word_embeddings=False)
    view, _, _, directory = scale(tmp_path, folder, ScalingSettings(kind="smoothquant"))
    for measured in calibrate(view, IDS, CPU):
        derived = InputGroup.load(group_file(directory, measured.name))
        assert measured.tensors == derived.tensors
        assert relative(derived.hessian, measured.hessian) < 1e-5
        assert relative(derived.statistics.mean_abs, measured.statistics.mean_abs) < 1e-5


def test_every_factor_of_columns_is_undone_by_the_producer_in_float64(tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 1, "num_key_value_heads": 1, "tie_word_embeddings": False}
    folder = save_small_model(tmp_path / "m", "qwen3", **changes)
    _, groups, _, directory = scale(tmp_path, folder, ScalingSettings(kind="smoothquant"))
    factors = {k: v.double() for k, v in folded_factors(ModelFolder(folder), directory, groups).items()}
    for group in groups:
        producer = producer_of(group)
        if producer is None:
            continue
        columns, rows = factors[f"{group}.weight{COLUMNS}"], factors[f"{producer}.weight{ROWS}"]
        repeated = rows.repeat(len(columns) // len(rows))  # one key-value head here: its query heads follow each other
        assert torch.allclose(columns * repeated, torch.ones_like(columns), rtol=2e-7)


def test_a_search_that_finds_nothing_leaves_the_weights_alone(tmp_path: Path) -> None:
    folder = save_small_model(tmp_path / "m", "llama", num_hidden_layers=1)
    view, groups, _, directory = scale(tmp_path, folder, ScalingSettings(kind="awq", grid=1))
    records = [scaling_record(directory, group) for group in groups]
    assert all(record["error"] <= 1 for record in records)
    unscaled = [r["group"] for r in records if r["alpha"] == 0 and not r["weighted"]]
    name = "model.embed_tokens.weight"
    assert name.removesuffix(".weight") in unscaled
    assert torch.equal(view.read(name), ModelFolder(folder).read(name))


def test_a_torn_scales_file_is_not_taken_for_done(tmp_path: Path) -> None:
    folder = save_small_model(tmp_path / "m", "llama", num_hidden_layers=1)
    _, groups, _, directory = scale(tmp_path, folder, ScalingSettings(kind="smoothquant"))
    assert all(scaling_done(directory, group) for group in groups)
    file = directory / "scales" / f"{groups[0]}.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    assert not scaling_done(directory, groups[0])


@pytest.mark.parametrize("name", [layout.SCALED_VIEW, layout.SCALING_FACTORS])
@pytest.mark.parametrize("content", [b"", b"{", b'{"another": "kind"}'])
def test_a_damaged_scaled_view_is_not_taken_for_done(name: str, content: bytes, tmp_path: Path) -> None:
    folder = ModelFolder(save_small_model(tmp_path / "m", "llama", num_hidden_layers=1))
    write_scaled_view(tmp_path / layout.SCALED_MODEL, folder.path, {})
    assert view_done(folder, tmp_path)
    (tmp_path / layout.SCALED_MODEL / name).write_bytes(content)
    assert not view_done(folder, tmp_path)


def test_a_model_whose_norms_add_one_is_refused(tmp_path: Path) -> None:
    folder = save_small_model(tmp_path / "m", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gemma2"}))
    with pytest.raises(ModelFolderError, match="found 'gemma2': use quantization.scaling.kind: none"):
        check_scalable(ModelFolder(folder))
