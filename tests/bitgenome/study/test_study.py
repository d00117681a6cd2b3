"""Studies from configuration to report: measured once, refused in one sentence."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from rich.console import Console

from bitgenome.common.errors import UserError
from bitgenome.config.study import load_study, parse_methods
from bitgenome.study.study import plan_study, run_study
from tests.conftest import REPOSITORY
from tests.small_models import save_small_model

CONFIGS = sorted((REPOSITORY / "configs").rglob("study-*.yaml"))
TOKENS = {"calibration": 256, "sensitivity": 64, "search": 64, "validation": 64, "test": 96}
TEXT = {"source": "file", "path": str(REPOSITORY / "LICENSE"), "window": 32, "tokens": TOKENS}
METHODS = [{"kind": "rtn", "sweep": {"bits": [2, 4]}}, {"kind": "quantile", "name": "five levels"}]


def write(path: Path, **changes: Any) -> Path:
    """A study of a small random model."""
    model = path / "model"
    if not model.exists():
        save_small_model(model, "llama")
    places = {"model": str(model), "storage_path": str(path / "runs")}
    settings = {"name": "small", **places, "text": TEXT, "workers": {"ray": "off"}, "methods": METHODS}
    file = path / "study.yaml"
    file.write_text(yaml.safe_dump({**settings, **changes}))
    return file


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_study_in_the_repository_can_be_planned(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert plan_study(load_study(path)).study.methods


def test_a_study_ends_in_tables_and_a_picture_and_measures_nothing_twice(tmp_path: Path) -> None:
    console = Console(quiet=True)
    path, first = run_study(load_study(write(tmp_path)), console)
    frame = pd.read_parquet(path / "results.parquet")
    assert frame.label.tolist() == ["rtn @ 2", "rtn @ 4", "five levels"]
    assert frame.line.tolist() == ["rtn", "rtn", "five levels"]
    assert frame.kl[1] < frame.kl[0]
    assert pd.read_csv(path / "results.csv").kl.tolist() == pytest.approx(frame.kl.tolist())
    assert set(pd.read_parquet(path / "allocations.parquet").method) == set(frame.label)
    assert "| rtn @ 2 | 2.000 |" in (path / "report.md").read_text()
    picture = (path / "kl-over-bits.svg").read_bytes()
    assert picture.count(b"five levels") == 1
    log = (path / "results.jsonl").read_bytes()
    (path / "results.jsonl").write_bytes(log[:-20])  # killed while it wrote the last line
    more = [*METHODS, {"kind": "gptq", "bits": 3}]
    _, second = run_study(load_study(write(tmp_path, methods=more)), console)
    kept = log.splitlines()[:2]
    assert (path / "results.jsonl").read_bytes().splitlines()[:2] == kept
    assert [r.kl for r in second[:3]] == [r.kl for r in first]
    assert second[3].label == "gptq @ 3"


def test_a_study_of_mutual_information_ends_in_pictures_and_costs(tmp_path: Path) -> None:
    methods = [{"kind": "mutual_information", "sweep": {"strategy": ["A", "B"], "groups": [1, 8]}}]
    file = write(tmp_path, methods=methods, activation_samples=64)
    path, results = run_study(load_study(file), Console(quiet=True))
    for picture in ("mutual-information-channels.png", "mutual-information-layers.png"):
        assert (path / picture).read_bytes().startswith(b"\x89PNG")
    assert (path / "report.md").read_text().count("| mutual_information, ") == 8
    a1, b1, a8, _ = results  # the file was written with its keys sorted
    scales = [r.stored_bits - r.average_bits for r in (a1, a8, b1)]
    assert scales == sorted(scales) and scales[0] < scales[2], "one for all channels, for a group, for each"
    assert b1.reconstruction < a1.reconstruction, "a grid of its own for each channel is finer"
    assert all(r.average_bits <= 4 and r.grouping_seconds > 0 for r in results)
    too_many = load_study(write(tmp_path, methods=[{"kind": "mutual_information", "groups": 65}]))
    with pytest.raises(UserError, match="expected groups from 1 to 64, the smallest input's channels, found 65"):
        plan_study(too_many)
    too_few = load_study(write(tmp_path, methods=methods, activation_samples=2048))
    with pytest.raises(UserError, match="expected at least 2048 tokens of calibration text for as many samples"):
        run_study(too_few, Console(quiet=True))


@pytest.mark.parametrize(
    ("methods", "sentence"),
    [
        ([{"kind": "budget", "target": 3.0}], "unknown key 'target' in methods[0] of a.yaml: did you mean target"),
        ([{"kind": "rtn"}, {"kind": "hqq"}], "expected a kind among rtn, gptq,"),
        ([{"kind": "budget", "target_avg_bits": 9.0}], "expected a target from 2 to 8 bits, the levels' own, found 9"),
        ([{"kind": "budget", "targets": [{"bits": 1.0}]}], "expected a target from 2 to 8 bits"),
        ([{"kind": "quantile", "levels": [4, 2]}], "expected two or more rising levels of 1 to 8 bits"),
        ([{"kind": "threshold", "levels": [2, 4]}], "expected three levels for thresholds"),
        ([{"kind": "quantile", "weights": {"hessian": -1}}], "finite, not negative and not all zero"),
        ([{"kind": "quantile", "without": "variance"}], "'activation', 'hessian', 'weight'"),
        ([{"kind": "rtn", "sweep": {"bits": 4}}], "expected sweep to give a list of values for each setting"),
        ([{"kind": "rtn", "bits": 2, "sweep": {"bits": [4]}}], "expected bits once in methods[0]"),
        ([{"kind": "rtn"}, {"kind": "rtn"}], "found 'rtn @ 4' twice"),
        ([], "expected a list of methods"),
        ([{"kind": "rtn", "bits": 9}], "less than or equal to 8, found 9"),
        ([{"kind": "rtn", "grid": {"group_size": 0}}], "expected a group size of at least 1 column, found 0"),
    ],
)
def test_methods_that_cannot_serve_are_answered_in_one_sentence(methods: list[Any], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_methods(methods, "a.yaml")
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_settings_that_cannot_serve_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown key 'tensor' in .*: did you mean tensors"):
        load_study(write(tmp_path, tensor="all"))
    with pytest.raises(UserError, match="found nothing at nowhere.yaml"):
        load_study(Path("nowhere.yaml"))
    (tmp_path / "runs" / "small").mkdir(parents=True)
    (tmp_path / "runs" / "small" / "run.json").touch()
    with pytest.raises(UserError, match="expected a directory for a study, found a run at"):
        plan_study(load_study(write(tmp_path)))


def test_sweeps_make_every_combination_with_a_line_for_each_but_the_axis() -> None:
    sweep = {"target_avg_bits": [3.0, 4.0], "without": [None, "hessian"]}
    methods = parse_methods([{"kind": "budget", "sweep": sweep}], "a.yaml")
    assert [method.label for method in methods] == [
        "budget @ 3", "budget, without hessian @ 3", "budget @ 4", "budget, without hessian @ 4",
    ]  # fmt: skip
    assert [method.line for method in methods[:2]] == ["budget", "budget, without hessian"]
