"""Three runs and a bad one as a batch on one Ray cluster: killed in the middle, continued, nothing done twice."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from bitgenome.batch.batch import BatchOrder, begin, complete, run_batch
from bitgenome.batch.children import is_child
from bitgenome.batch.config import load_batch
from bitgenome.common import layout
from bitgenome.common.errors import UserError
from bitgenome.storage.lease import Lease, LeaseHeldError
from tests.bitgenome.conftest import LITTLE, Finished, Runs
from tests.bitgenome.run.test_resume import start
from tests.conftest import EMBEDDED
from tests.small_models import save_small_model

pytestmark = pytest.mark.slow
MATRIX = {
    "budget": [{"bits_per_weight": 7.0}, {"bits_per_weight": 8.0}],
    "search.strategy": ["genetic", "exact"],
}
EXCLUDED = {"budget": {"bits_per_weight": 8.0}, "search.strategy": "genetic"}
PATIENCE_S = 900


def wait_until(what: Callable[[], bool], driver: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + PATIENCE_S
    while driver.poll() is None and not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file of a run; the share that a batch gave it goes with the batch."""
    files = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (found.st_ino, found.st_mtime_ns) for name, found in files.items() if name != layout.WORKER_LIMIT}


@dataclass(frozen=True)
class Story:
    """A batch that was killed after its first runs, and continued."""

    runs: Runs
    path: Path
    children: int  # that lived when it was killed
    before: dict[str, dict[str, tuple[int, int]]]  # stamps of shared artefacts and finished runs when it was killed
    refusal: str  # of starting it again as a new one
    resumed: Finished

    @property
    def names(self) -> list[str]:
        return [f"small-{kind}" for kind in ("7.0bpw-genetic", "7.0bpw-exact", "8.0bpw-exact")]


def settings(storage: Path, ray: str) -> dict[str, Any]:
    """Of runs of a random model, made where it is not there; its time goes into starting processes."""
    model = storage / "small"
    if not model.exists():
        save_small_model(model, "llama")
    changes = {"model": str(model), "levels": ["W4", "W8"], "workers": {"ray": ray}}
    return {**LITTLE, **changes, "storage_path": str(storage)}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    runs = Runs(tmp_path_factory.mktemp("batch"))
    storage = runs.storage
    files = [storage / "matrix.yaml", storage / "bad.yaml"]
    base = settings(storage, "local")
    files[0].write_text(yaml.safe_dump({"base": base, "matrix": MATRIX, "exclude": [EXCLUDED]}))
    bad = {"name": "bad", "model": str(bad_model(storage / "model")), "budget": {"bits_per_weight": 6}}
    files[1].write_text(yaml.safe_dump({**base, **bad}))
    path = storage / "batch-three"
    arguments = ["batch", *files, "--name", "three", "--max-parallel", "2"]
    driver = start(runs, *arguments)
    try:
        wait_until(lambda: len(proved(storage)) >= 1, driver)
        family = psutil.Process(driver.pid).children(recursive=True)
        children = [process for process in family if is_child(process.as_dict(["cmdline"])["cmdline"] or [], path)]
    finally:
        driver.kill()
        driver.communicate()
    assert psutil.wait_procs(children, timeout=60)[1] == [], "runs end with their batch"
    kept = [storage / "shared", *proved(storage)]
    before = {path.name: stamps(path) for path in kept}
    with pytest.raises(UserError) as refused:
        begin(load_batch(files), path, str(path), resume=False)
    resumed = runs.call(*arguments, "--resume")
    return Story(runs, path, len(children), before, str(refused.value), resumed)


def proved(storage: Path) -> list[Path]:
    """The directories of runs with everything written: best.json before the proof and after it, then the report."""
    runs = [file.parent for file in storage.glob("*/best.json") if json.loads(file.read_text())["proof"]]
    return [run for run in runs if (run / layout.REPORT).is_file()]


def bad_model(folder: Path) -> Path:
    """The embedded model with a weight that only the run itself finds."""
    folder.mkdir()
    for file in EMBEDDED.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 3] = torch.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_begun_batch_is_refused_with_the_way_to_continue_it(story: Story) -> None:
    assert story.refusal.startswith(f"expected a new batch, found {story.path} with ")
    assert "of 4 runs unfinished: continue it with --resume" in story.refusal
    assert "\n" not in story.refusal


def test_what_was_finished_when_the_batch_was_killed_is_not_touched_again(story: Story) -> None:
    assert story.children > 0
    finished = story.before.keys() - {"shared"}
    assert 1 <= len(finished) < 3
    for name in finished:
        assert stamps(story.runs.storage / name) == story.before[name]
        assert f"{name}: finished already" in story.resumed.stdout


def test_no_genome_is_evaluated_twice_in_any_run(story: Story) -> None:
    for name in story.names:
        keys = [(tuple(e["genome"]), e["split"], e["tokens"]) for e in story.runs.evaluations(name)]
        assert len(keys) == len(set(keys)) > 0


def test_no_run_keeps_the_share_that_the_batch_gave_it(story: Story) -> None:
    assert list(story.runs.storage.glob(f"*/{layout.WORKER_LIMIT}")) == []
    said = (story.runs.storage / story.names[0] / "events.log").read_text()
    assert f"{layout.WORKER_LIMIT} of the batch three" in said


def test_bank_calibration_and_sensitivities_are_made_once_for_all_runs(story: Story) -> None:
    shared = story.runs.storage / "shared"
    assert [len(list((shared / kind).iterdir())) for kind in ("calibration", "bank", "sensitivity")] == [1, 1, 1]
    assert stamps(shared) == story.before["shared"]
    assert len({story.runs.bank(name) for name in story.names}) == 1


def test_a_bad_run_fails_alone_and_is_named(story: Story) -> None:
    assert story.resumed.returncode == 1
    assert "1 of 4 runs failed: bad" in story.resumed.stderr
    assert "bad: failed: expected finite weights, found 1 of 196608 not finite in" in story.resumed.stdout


def test_the_table_has_all_runs_the_best_first_within_a_budget(story: Story) -> None:
    frame = pd.read_parquet(story.path / "results.parquet")
    assert len(frame) == 4 and set(frame.name) == {*story.names, "bad"}
    finished = frame[frame.stage == "finished"]
    assert sorted(finished.name) == sorted(story.names)
    assert sorted(finished.groupby("budget_bytes").size()) == [1, 2]
    for _, group in finished.groupby("budget_bytes"):
        assert group.simulated_kl.is_monotonic_increasing
        assert (group.file_bytes <= group.budget_bytes).all()
    written = pd.read_csv(story.path / "results.csv")
    assert written.mean_kl.dropna().tolist() == pytest.approx(finished.mean_kl.tolist())
    for row in finished.to_dict("records"):
        best = story.runs.best(row["name"])
        proof = best["proof"]
        kls = proof["simulated_kl"], proof["figures"]["mean_kl"]["value"]
        assert (row["simulated_kl"], row["mean_kl"]) == kls
        assert row["evaluations"] == len(story.runs.evaluations(row["name"]))
        assert (story.path / row["run"] / row["gguf"]).is_file()


def test_the_page_links_the_report_of_every_run_and_loads_nothing(story: Story) -> None:
    page = (story.path / "leaderboard.html").read_text()
    for name in story.names:
        assert f'<a href="../{name}/report.html">{name}</a>' in page
        assert (story.path.parent / name / "report.html").is_file()
    assert '<a href="../bad/">bad</a>' in page and "not finite" in page
    assert "src=" not in page.partition('<script type="application/json"')[0]


def test_a_finished_run_without_its_report_gets_it(story: Story) -> None:
    """As after a kill between best.json and the report."""
    page = story.runs.storage / story.names[0] / layout.REPORT
    page.unlink()
    files = [story.runs.storage / name for name in ("matrix.yaml", "bad.yaml")]
    (run,) = (run for run in load_batch(files) if run.name == story.names[0])
    assert run.finished
    complete(run)
    written = page.stat()
    complete(run)
    assert "<html" in page.read_text() and page.stat().st_mtime_ns == written.st_mtime_ns


def test_no_token_is_written_down(story: Story) -> None:
    token_file = Path.home() / ".ray" / "auth_token"
    tokens = [os.environ.get("RAY_AUTH_TOKEN", ""), token_file.read_text().strip() if token_file.is_file() else ""]
    for path in (p for folder in ("configs", "logs") for p in (story.path / folder).iterdir()):
        assert not any(token and token in path.read_text() for token in tokens)


def test_an_interrupted_batch_stops_its_runs_in_order_and_says_how_to_continue(story: Story) -> None:
    storage = story.runs.storage
    base = settings(storage, "off")
    base["search"] = {**base["search"], "generations": 2000, "population": 8}
    file = storage / "long.yaml"
    file.write_text(yaml.safe_dump({"base": base, "matrix": {"budget": [{"bits_per_weight": 7.2}]}}))
    driver = start(story.runs, "batch", file)
    checkpoint = storage / "small-7.2bpw" / "checkpoint.json"
    wait_until(checkpoint.is_file, driver)
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGTERM)
    _, said = driver.communicate(timeout=90)
    assert driver.returncode == 130, said
    assert f"bitgenome batch {file} --name long --resume" in said
    assert not any(process.is_running() for process in family)
    assert "interrupted; nothing is lost" in (storage / "batch-long" / "logs" / "small-7.2bpw.log").read_text()
    assert json.loads(checkpoint.read_text())


@pytest.mark.long  # a single run behind a URL: test_s3.py
def test_a_batch_behind_a_url_is_known_to_another_machine(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = (tmp_path / "nfs").as_uri()
    base = {**settings(story.runs.storage, "off"), "storage_path": url}
    matrix = {"budget": [{"bits_per_weight": 7.0}], "search.strategy": ["exact"]}
    file = tmp_path / "far.yaml"
    file.write_text(yaml.safe_dump({"base": base, "matrix": matrix}))
    name, location = "small-7.0bpw-exact", f"{url}/batch-far"
    monkeypatch.setenv("BITGENOME_CACHE", str(tmp_path / "disk"))
    shutil.copytree(story.runs.storage / "shared", tmp_path / "nfs" / "shared")  # as an earlier run left it
    with (
        Lease(location, "the batch"),
        pytest.raises(LeaseHeldError, match=f"expected the batch {location} to be nobody"),
    ):
        run_batch(load_batch([file]), BatchOrder("far"), Console(quiet=True))
    done = story.runs.call("batch", file)
    assert done.returncode == 0, done.stderr
    assert f"stored  {location}" in done.stdout
    assert f"{name}: finishing" in done.stdout, "the batch sees how far a run has come"
    monkeypatch.setenv("BITGENOME_CACHE", str(tmp_path / "another disk"))
    _, again = run_batch(load_batch([file]), BatchOrder("far", resume=True), Console())
    assert f"{name}: finished already" in capsys.readouterr().out
    assert not list((tmp_path / "another disk").glob(f"*/{name}")), "and has nothing to do"
    (first,) = pd.read_parquet(next((tmp_path / "disk").glob("*/batch-far/results.parquet"))).to_dict("records")
    (second,) = again.to_dict("records")
    assert first == second and first["mean_kl"] > 0 and first["evaluations"] > 0
    remote = tmp_path / "nfs" / "batch-far"
    assert pd.read_csv(remote / "results.csv").mean_kl.tolist() == pytest.approx([first["mean_kl"]])
    assert (remote / layout.LOGS / f"{name}.log").is_file() and (remote / "leaderboard.html").is_file()
    file.write_text(yaml.safe_dump({"base": base, "matrix": {**matrix, "search.strategy": ["exact", "genetic"]}}))
    with pytest.raises(UserError, match=f"expected a new batch, found {location} with 1 of 2 runs unfinished"):
        begin(load_batch([file]), tmp_path, location, resume=False)
