"""Importance of whole tensors and of scales' columns, as the search and the bank take them."""

from itertools import combinations
from pathlib import Path

import pytest
import torch

from evaluators.model.folder import ModelFolder
from evaluators.prepare.bank import Bank, BuildBankGroup, bank_digest, scale_importance
from evaluators.prepare.calibration import calibrate
from evaluators.prepare.input_group import InputGroup
from evaluators.prepare.tensor_importance import gene_importance
from quantizers.formats.table import FORMATS
from quantizers.rounding.sparsegpt import compensate, conditional_importance
from quantizers.settings import CompensationSettings
from quantizers.statistics.hessian import inverse_factor
from quantizers.statistics.importance import DIMENSIONS, ImportanceWeights, channel_dimensions, combined_importance
from quantizers.statistics.moments import StatisticsAccumulator
from search.gene_groups import tied_genes
from search.types import SearchSpace
from tests.quantizers.weights import correlated_hessian, heavy_tailed
from tests.small_models import save_small_model

SHAPES = {"a": (2, 256), "b": (4, 256), "c": (8, 256)}


def test_a_genes_score_is_that_of_its_tensors_by_their_weights() -> None:
    space = SearchSpace.per_tensor(SHAPES, ("W2", "W4"), 0)
    dimensions = {
        name: dict.fromkeys(DIMENSIONS, 1.0) | {"activation": value}
        for name, value in zip("abc", (1, 2, 3), strict=True)
    }
    for name, (rows, _) in SHAPES.items():
        dimensions[name]["sensitivity"] = float(rows)
    scores = gene_importance(space, dimensions, ImportanceWeights(1, 0, 0, 1, 0))
    assert scores == pytest.approx([0.5 * 0.5 + 0.5, 0.5 * 1.0 + 0.5, 0.5 * 1.5 + 0.5])
    tied = SearchSpace(tied_genes(space, {"a": "x", "c": "x"}), 0)
    assert gene_importance(tied, dimensions, ImportanceWeights(1, 0, 0, 1, 0)) == pytest.approx(
        [(2 * 0.75 + 8 * 1.25) / 10, 1.0]
    )


def test_scales_are_fitted_under_the_importance_that_is_asked_for() -> None:
    W, H = heavy_tailed(32, 256), correlated_hessian(256)
    statistics = StatisticsAccumulator(256)
    statistics.add(torch.randn(64, 256))
    group = InputGroup("g", ("w",), H, statistics.statistics())
    assert scale_importance("conditional", {"w": W}, H, group.statistics, 0.01) is None
    assert torch.equal(scale_importance("hessian", {"w": W}, H, group.statistics, 0.01), H.diagonal())  # type: ignore[arg-type]
    expected = combined_importance(channel_dimensions(W, H, group.statistics))
    torch.testing.assert_close(scale_importance("five_dimensional", {"w": W}, H, group.statistics, 0.01), expected)
    formats = {"w": [FORMATS["Q3_K"]]}
    default = compensate({"w": W}, formats, H)["w"]["Q3_K"]
    U, _ = inverse_factor(H, 0.01)
    same = compensate({"w": W}, formats, H, importance=conditional_importance(U, H))["w"]["Q3_K"]
    other = compensate({"w": W}, formats, H, importance=torch.linspace(0.1, 2, 256))["w"]["Q3_K"]
    assert torch.equal(default.packed.data, same.packed.data)
    assert not torch.equal(default.packed.data, other.packed.data)
    with pytest.raises(ValueError, match=r"expected importance of shape \(256,\)"):
        compensate({"w": W}, formats, H, importance=torch.ones(5))


def test_a_bank_takes_the_importance_that_it_is_asked_for(tmp_path: Path) -> None:
    folder = save_small_model(tmp_path / "model", "llama", tokenizer=False, hidden_size=256, vocab_size=64)
    (group, *_) = calibrate(ModelFolder(folder), torch.arange(64).reshape(2, 32), torch.device("cpu"))
    group.save(tmp_path / "group.safetensors")
    formats = dict.fromkeys(group.tensors, ("Q3_K",))
    packed = {}
    for importance in ("conditional", "hessian", "five_dimensional"):
        directory = tmp_path / importance
        directory.mkdir()
        task = BuildBankGroup(
            folder, tmp_path / "group.safetensors", directory, formats, CompensationSettings(), importance=importance
        )
        task.run({})
        packed[importance] = Bank(directory).packed(group.tensors[0], FORMATS["Q3_K"])
    assert not any(torch.equal(packed[a], packed[b]) for a, b in combinations(packed, 2))
    digests = {bank_digest("m", "c", {}, CompensationSettings(), {}, importance) for importance in packed}
    assert len(digests) == 3
