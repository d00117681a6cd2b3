"""A run with tied genes: the file has the searched size, tied tensors share a format, and it can be exported again."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from bitgenome.common.errors import UserError
from bitgenome.config.run import load_config
from bitgenome.plan.plan import make_plan
from bitgenome.run import proof
from bitgenome.run.export import export_again
from bitgenome.run.pipeline import run
from exporters.files.gguf_reader import read_gguf
from exporters.opening.source import read_model
from exporters.runtime.llamacpp import LlamaCppRuntime
from tests.conftest import REPOSITORY
from tests.small_models import save_small_model

TOKENS = {"calibration": 256, "sensitivity": 64, "search": 64, "validation": 64, "test": 96}
TEXT = {"source": "file", "path": str(REPOSITORY / "LICENSE"), "window": 32, "tokens": TOKENS}


def write(path: Path, groups: dict[str, Any], **more: Any) -> Path:
    model = path / "model"
    if not model.exists():
        save_small_model(model, "qwen2")
    config = {
        "name": "tied",
        "llamacpp_mix": "off",
        "model": str(model),
        "budget": {"compression_ratio": 0.5},
        "levels": ["W2", "W4", "W6"],
        "text": TEXT,
        "search": {"population": 4, "generations": 2, "gene_groups": groups, **more.pop("search", {})},
        "workers": {"ray": "off"},
        "storage_path": str(path / "runs"),
        **more,
    }
    file = path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def test_a_run_with_genes_tied_by_mutual_information_has_its_exact_size_and_its_shards_are_proved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_files: list[str | Path] = []

    class Noted(LlamaCppRuntime):
        def __init__(self, path: str | Path, *arguments: int) -> None:
            run_files.append(path)
            super().__init__(path, *arguments)

    monkeypatch.setattr(proof, "LlamaCppRuntime", Noted)
    groups = {"by": "mutual_information", "count": 5, "samples": 64}
    config = load_config(write(tmp_path, groups, export={"split_max_size": "40KB"}))
    outcome = run(config, Console(quiet=True))
    assert len(outcome.winner.evaluation.genome) == 5
    assert outcome.gguf.stat().st_size == outcome.winner.evaluation.file_bytes <= outcome.budget_bytes
    best = json.loads((outcome.run / "best.json").read_text())
    labels = json.loads((outcome.run / "gene-groups.json").read_text())
    assert len(labels) == 15 and len(set(labels.values())) == 5
    for label in set(labels.values()):
        assert len({best["formats"][name] for name, own in labels.items() if own == label}) == 1
    shipped = outcome.gguf.read_bytes()
    outcome.gguf.unlink()
    again = export_again(outcome.run)
    shards = sorted(outcome.run.glob("*-of-*.gguf"))
    assert again.read_bytes() == shipped and run_files == shards[:1]
    model = read_model(shards[0])
    assert set(model.parts[0].tensors) < set(model.tensors) == set(read_gguf(again).tensors)


def test_a_run_under_five_dimensional_importance_and_prior_ends_in_a_file(tmp_path: Path) -> None:
    more = {"quantization": {"importance": "five_dimensional"}, "search": {"mutation_prior": "five_dimensional"}}
    outcome = run(load_config(write(tmp_path, {"by": "kind"}, healing={"enabled": "off"}, **more)), Console(quiet=True))
    assert outcome.gguf.stat().st_size == outcome.winner.evaluation.file_bytes <= outcome.budget_bytes
    assert len(outcome.winner.evaluation.genome) == 8


@pytest.mark.parametrize(("by", "genes"), [("kind", 8), ("layer", 3), ("none", 15)])
def test_a_plan_ties_by_kind_and_layer_without_measuring(by: str, genes: int, tmp_path: Path) -> None:
    plan = make_plan(load_config(write(tmp_path, {"by": by})))
    assert len(plan.space.genes) == genes
    free = make_plan(load_config(write(tmp_path, {}))).space
    assert 0 <= free.fixed_bytes - plan.space.fixed_bytes <= 4 * (15 - genes) + 32, "a genome is as long as its genes"


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ({"by": "mutual_information"}, "expected count with by: mutual_information"),
        ({"by": "kind", "count": 3}, "expected count with by: mutual_information and with nothing else"),
        ({"by": "mutual_information", "count": 16, "samples": 64}, "from 1 to 15, the model's quantizable tensors"),
        ({"by": "mutual_information", "count": 4, "samples": 512}, r"up to text.tokens.calibration \(256\), found 512"),
        ({"by": "colour"}, "'none', 'kind', 'layer' or 'mutual_information', found 'colour'"),
    ],
)
def test_groups_that_cannot_be_are_answered_with_what_is_valid(
    groups: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        make_plan(load_config(write(tmp_path, groups)))
