"""What ``import bitgenome`` offers agrees with what the run's files hold, and Optuna reads it."""

import json
from math import isfinite
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

import bitgenome
import bitgenome.run.pipeline
from tests.bitgenome.cli.test_command_line import SLOW, imported_by
from tests.bitgenome.conftest import call_here
from tests.conftest import REPOSITORY

NOTEBOOK = REPOSITORY / "docs" / "notebooks" / "python-api.ipynb"


@pytest.fixture
def run(little: Path) -> bitgenome.Run:
    return bitgenome.Run.open("little", str(little))


def lines(run: bitgenome.Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run.location) / "evaluations.jsonl").read_text().splitlines()]


def test_importing_it_imports_no_library_that_takes_seconds() -> None:
    assert (
        imported_by("-c", "import bitgenome; bitgenome.run, dir(bitgenome)") & (SLOW | {"pydantic", "numpy"}) == set()
    )


def test_frames_hold_what_was_evaluated_and_which_types_it_had(run: bitgenome.Run) -> None:
    frame = run.evaluations(params=True)
    assert frame.kl.tolist() == [line["kl"] for line in lines(run)]
    assert frame.split.tolist() == [line["split"] for line in lines(run)]
    best = run.best
    (row,) = frame[(frame.split == "validation") & (frame.genome == best.genome)].to_dict("records")
    assert {name: row[f"params_{name}"] for name in best.types} == best.types
    record = json.loads((Path(run.location) / "best.json").read_text())
    assert (best.test_kl, best.healed) == (record["proof"]["figures"]["mean_kl"]["value"], False)
    assert row["bits_per_weight"] == pytest.approx(best.bits_per_weight) == record["bits_per_weight"]
    assert row["kl"] == best.validation_kl


def test_a_front_has_every_evaluation_that_none_beats_and_no_other(run: bitgenome.Run) -> None:
    for split in ("search", "validation", "test"):
        front, all_of_it = run.front(split), run.evaluations()
        text = all_of_it[all_of_it.split == split]
        assert front.file_bytes.is_monotonic_increasing and front.loss.is_monotonic_decreasing and len(front)
        for row in text.itertuples():
            better = ((front.file_bytes <= row.file_bytes) & (front.loss <= row.loss)).any()
            assert better or row.genome in front.genome.tolist()


def test_other_sizes_are_listed_and_made_beside_the_run(run: bitgenome.Run) -> None:
    sizes = run.sizes()
    assert sizes.file_bytes.is_monotonic_increasing and sizes.measured.any()
    smaller = run.with_budget(bits=7.0, progress=False)
    assert smaller.best.bits_per_weight <= 7.0 < run.best.bits_per_weight
    assert Path(smaller.location).parent == Path(run.location).parent
    with pytest.raises(bitgenome.UserError, match="expected one size"):
        run.with_budget()


def test_a_comparison_is_a_frame_with_a_row_for_every_file(run: bitgenome.Run) -> None:
    frame = run.compare(mixes=["Q8_0"], max_tokens=2, skip_original=True, progress=False).set_index("kind")
    assert sorted(frame.index) == ["llama.cpp", "ours"]
    assert frame.file_bytes["ours"] == run.best.file_bytes
    assert frame["figures.mean_kl.value"]["ours"] == pytest.approx(run.best.test_kl, rel=0.01)


@pytest.mark.parametrize("objectives", [("loss",), ("kl", "file_bytes")])
def test_optuna_loads_the_journal_with_equal_values_and_parameters(
    run: bitgenome.Run, tmp_path: Path, objectives: tuple[str, ...]
) -> None:
    journal = tmp_path / "journal.log"
    options = [word for name in objectives for word in ("--objective", name)]
    done = call_here("export-optuna", run.location, "-o", journal, *options)
    assert done.returncode == 0, done.stderr
    frame = run.evaluations(params=True)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    texts = list(frame.groupby(["split", "tokens", "draw"], sort=False))
    summaries = optuna.get_all_study_summaries(storage)
    assert len(summaries) == len(texts) and all(summary.study_name in done.stdout for summary in summaries)
    for summary, (_, measured) in zip(summaries, texts, strict=True):
        study = optuna.load_study(study_name=summary.study_name, storage=storage)
        assert study.metric_names == list(objectives)
        found = [trial for trial in study.trials if trial.values is not None]
        rows = measured[measured[list(objectives)].map(isfinite).all(axis=1)]
        assert [trial.values for trial in found] == rows[list(objectives)].astype(float).to_numpy().tolist()
        params = rows.filter(like="params_").rename(columns=lambda name: name.removeprefix("params_"))
        assert [trial.params for trial in found] == params.to_dict("records")
        taken = [trial.duration.total_seconds() for trial in found if trial.duration]
        assert taken == pytest.approx(rows.seconds.tolist(), abs=1e-5)


def test_what_cannot_be_is_one_sentence_and_leaves_what_is_there(run: bitgenome.Run, tmp_path: Path) -> None:
    journal = tmp_path / "journal.log"
    journal.write_text("mine")
    with pytest.raises(bitgenome.UserError, match="expected objectives of loss, kl, .*, found bits"):
        run.to_optuna(journal, ["bits"])
    with pytest.raises(bitgenome.UserError, match="expected a folder for the file, found none at"):
        run.to_optuna(tmp_path / "none" / "journal.log")
    assert journal.read_text() == "mine"
    with pytest.raises(bitgenome.UserError, match="expected a run directory"):
        bitgenome.Run.open(tmp_path / "none")
    (Path(run.location) / "best.json").unlink()
    with pytest.raises(bitgenome.UserError, match="expected a finished run"):
        _ = run.best
    with pytest.raises(bitgenome.UserError, match="serach"):
        bitgenome.load_config({"name": "x", "model": "m", "budget": {"bits_per_weight": 4}, "serach": {}})


def test_the_notebook_runs_from_plan_to_file(
    little: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    monkeypatch.chdir(tmp_path)
    values = {"CONFIG": str(little / "little.yaml"), "OVERRIDES": [], "JOURNAL": str(tmp_path / "journal.log")}
    space: dict[str, Any] = {}
    before = {file.name: file.read_bytes() for file in (little / "little").glob("*.gguf")}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), space)
            if "parameters" in cell["metadata"].get("tags", ()):
                assert values.keys() <= space.keys()
                space |= values
    assert {file.name: file.read_bytes() for file in (little / "little").glob("*.gguf")} == before
    assert isinstance(space["front"], pd.DataFrame) and "trials," in capsys.readouterr().out
