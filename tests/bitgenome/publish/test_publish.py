"""A run's file is published by huggingface_hub's own client, to a hub on this machine."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import yaml

from bitgenome.common import layout
from bitgenome.publish.base import base_of
from tests.bitgenome.conftest import EMBEDDED, Finished, Runs, assert_one_sentence, call_here
from tests.bitgenome.publish.hub_server import TOKEN, FakeHub, hub_server


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with hub_server() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # its variable is read at import
        yield found


def publish(runs: Runs, *arguments: str | Path) -> Finished:
    return call_here("publish", runs.storage / "base", "me/small", *arguments)


@pytest.mark.usefixtures("finished")
def test_a_file_is_published_with_its_card_recipe_and_importance_and_again_in_place(runs: Runs, hub: FakeHub) -> None:
    hub.cards["base/original"] = {"license": "apache-2.0", "language": ["en"]}
    done = publish(runs, "--yes", "--private", "--base-model", "base/original")
    assert done.returncode == 0, done.stderr
    best, there = runs.best("base"), hub.files["me/small"]
    assert set(there) == {"README.md", best["gguf"], layout.RECIPE, layout.RECIPE_COMMAND, layout.IMATRIX}
    for name in there.keys() - {"README.md"}:
        assert there[name] == (runs.storage / "base" / name).read_bytes()
    assert hub.private["me/small"] and f"{hub.url}/me/small" in done.stdout
    _, front, card = there["README.md"].decode().split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["base_model"] == "base/original" and about["license"] == "apache-2.0" and about["language"] == ["en"]
    assert {"gguf", "quantized"} <= set(about["tags"])
    mean, maximum = (best["proof"]["figures"][name]["value"] for name in ("mean_kl", "maximum_kl"))
    figures = f"{best['gguf_bytes']:,} bytes", f"| {mean:.5f} |", f"{maximum:.6f}", "| Q4_K |"
    for said in (*figures, "bitgenome run base.yaml", f"llama-server -hf me/small --hf-file {best['gguf']}"):
        assert said in card, said
    assert str(runs.storage) not in card and str(EMBEDDED) not in card  # nothing of this machine
    again = publish(runs, "--yes", "--license", "mit")
    assert again.returncode == 0 and again.stdout.count("replaces the one there") == 5, again.stderr
    assert "license: mit" in hub.files["me/small"]["README.md"].decode()


@pytest.mark.usefixtures("finished")
def test_a_dry_run_shows_card_and_files_and_sends_nothing(
    runs: Runs, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    shown = publish(runs, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "## Recipe" in shown.stdout and runs.best("base")["gguf"] in shown.stdout
    assert "names no licence" in shown.stdout and hub.asked == []


@pytest.mark.usefixtures("finished")
def test_what_cannot_be_published_is_said_in_one_sentence(
    runs: Runs, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert_one_sentence(call_here("publish", runs.storage / "base", "small", "--yes"), "USER/NAME")
    assert_one_sentence(publish(runs), "--yes or --dry-run")
    assert_one_sentence(publish(runs, "--yes", "--base-model", "x"), "--base-model")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert_one_sentence(publish(runs, "--yes"), hub.url)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert_one_sentence(publish(runs, "--yes"), "hf auth login")
    assert hub.files == {}
    run = tmp_path / "base"
    shutil.copytree(runs.storage / "base", run)
    (run / runs.best("base")["gguf"]).write_bytes(b"GGUF")
    assert_one_sentence(call_here("publish", run, "me/small", "--dry-run"), "writes it again")
    (run / layout.BEST).unlink()
    assert_one_sentence(call_here("publish", run, "me/small", "--dry-run"), "bitgenome resume")


def test_without_the_client_or_the_hub_one_sentence_says_so(
    runs: Runs, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert_one_sentence(publish(runs, "--yes"), "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert_one_sentence(publish(runs, "--yes"), "pip install huggingface_hub")


@pytest.mark.parametrize(
    ("model", "keys", "hub_id", "licence"),
    [
        ("org/name", {}, "org/name", None),
        ("/cache/models--org--name/snapshots/abc", {}, "org/name", None),
        (
            "/x/m.gguf",
            {"general.repo_url": "https://huggingface.co/org/name", "general.license": "mit"},
            "org/name",
            "mit",
        ),
        ("/x/m.gguf", {}, None, None),
    ],
)
def test_a_models_id_and_licence_are_found_where_they_are(
    model: str, keys: dict[str, str], hub_id: str | None, licence: str | None
) -> None:
    found = base_of(model, "m", keys)
    assert (found.hub_id, found.license) == (hub_id, licence)


def test_a_folders_card_says_the_licence_else_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"license": "mit"}')
    assert base_of(str(tmp_path), "m", {}).license == "mit"
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: own\ntags: [x]\n---\n# A model\n")
    assert base_of(str(tmp_path), "m", {}).about == {"license": "other", "license_name": "own"}
    (tmp_path / "README.md").write_text("---\n{broken\n---\n")
    assert base_of(str(tmp_path), "m", {}).license == "mit"
