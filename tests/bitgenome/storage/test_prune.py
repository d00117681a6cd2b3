"""What no run needs is shown and removed, and nothing else: in a folder and behind a URL."""

import json
from pathlib import Path

import pytest

from bitgenome.storage.lease import Lease
from bitgenome.storage.prune import artefacts
from tests.bitgenome.conftest import call_here
from workers.storage.folders import mirror_root

USED = {
    "done": ["bank/1111", "calibration/2222", "text/3333"],
    "begun": ["bank/4444", "calibration/2222"],
    "old": [],
}
FREE = ["calibration/5555", "bank/6666", "sensitivity/7777"]


@pytest.fixture(params=["folder", "url"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs with what they use, and artefacts that they do not."""
    monkeypatch.setenv("BITGENOME_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "runs"
    names = ["bank/1111", "calibration/2222", "text/3333", "bank/4444", "bank/8888", "model/9999999999999999", *FREE]
    for size, name in enumerate(names):
        folder = root / "shared" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        (folder / "part.safetensors").write_bytes(bytes(size))
    for run, used in USED.items():
        (root / run).mkdir()
        record = {"ended": "finished"} if run == "done" else {}
        if run == "old":  # from before there was a list
            record = {"bank": "/elsewhere/shared/bank/8888", "digests": {"model": "9" * 64}}  # type: ignore[dict-item]
        (root / run / "run.json").write_text(json.dumps(record))
        if used:
            (root / run / "shared.txt").write_text("\n".join(used) + "\n")
    if request.param == "folder":
        return str(root)
    copy = mirror_root(f"file://{root}") / "shared" / FREE[0]
    copy.mkdir(parents=True)
    (copy / "part.safetensors").write_bytes(b"copy")
    return f"file://{root}"


def there(storage: str) -> set[str]:
    return {artefact.name for artefact in artefacts(storage)}


def test_what_no_run_needs_is_shown_and_removed_when_that_is_wanted(storage: str) -> None:
    before = there(storage)
    shown = call_here("prune", "--storage", storage, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    lines = {words[0]: words for line in shown.stdout.splitlines() if (words := line.split()) and "/" in words[0]}
    assert {name for name, line in lines.items() if line[-1] == "none"} == set(FREE)
    assert lines["calibration/2222"][-2:] == ["begun,", "done"]
    assert there(storage) == before
    asked = call_here("prune", "--storage", storage)
    assert asked.returncode == 2
    assert "expected --yes or --dry-run where nobody can be asked" in asked.stderr
    assert there(storage) == before

    root = storage.removeprefix("file://")
    with Lease(f"{root}/shared/{FREE[1]}", "a bank that is being built"):
        done = call_here("prune", "--storage", storage, "--yes")
    assert done.returncode == 0, done.stderr
    assert f"kept {FREE[1]}: somebody uses it by now" in done.stdout
    assert there(storage) == before - {FREE[0], FREE[2]}
    assert not list((mirror_root(storage) / "shared" / FREE[0]).glob("*.safetensors"))


def test_finished_runs_give_up_what_export_and_verify_do_not_read(storage: str) -> None:
    def needed(name: str) -> tuple[str, ...]:
        return next(a.runs for a in artefacts(storage, keep_for_resume=False) if a.name == name)

    assert needed("text/3333") == ()
    assert needed("bank/1111") == ("done",)
    assert needed("calibration/2222") == ("begun",)
    assert needed("bank/8888") == needed("model/9999999999999999") == ("old",)
    with Lease(f"{storage.removeprefix('file://')}/done", "the run done"):
        assert needed("text/3333") == ("done",), "somebody works on it"


def test_a_storage_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = call_here("prune", "--storage", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert f"found no folder at {tmp_path}/nowhere" in done.stderr
