"""A damaged file of a run is made again where that is possible, and is one sentence where it is not."""

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path

import pytest
import yaml

from tests.bitgenome.conftest import LITTLE, Finished, call_here
from tests.conftest import built_once
from tests.small_models import save_small_model

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "garbage": lambda content: b"\xff\x00{[\n" * 20,
    "another kind": lambda content: b'{"another": ["kind", 1]}\n',
}
NEEDED = ("run.json", "evaluations.jsonl", "checkpoint.json", "checkpoint-told.jsonl")  # nothing can make them again
MADE = ("parquet", "groups.json", "manifest.json", "parts.jsonl", "seconds.json", "safetensors")  # endings
READERS = {
    "status": ("run.json", "evaluations.jsonl", "generations.jsonl", "best.json"),
    "export": ("run.json", "best.json", "manifest.json"),
    "verify": ("run.json", "best.json", "windows.safetensors", ".gguf"),
}


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The storage path of a finished run ``little`` of this process alone."""

    def build(storage: Path) -> None:
        model = save_small_model(storage / "model", "llama")
        config = {**LITTLE, "name": "little", "model": str(model), "levels": ["W4", "W8"], "workers": {"ray": "off"}}
        config |= {"storage_path": str(storage), "budget": {"bits_per_weight": 8.0}}
        (storage / "little.yaml").write_text(yaml.safe_dump(config))
        done = call_here("run", storage / "little.yaml")
        assert done.returncode == 0, done.stderr

    yield built_once(tmp_path_factory, "little-run", build)


@pytest.fixture
def copy(little: Path, tmp_path: Path) -> Path:
    """A copy of the storage path, to be damaged."""
    shutil.copytree(little, tmp_path / "runs")
    record = tmp_path / "runs" / "little" / "run.json"
    record.write_text(record.read_text().replace(str(little), str(tmp_path / "runs")))
    return tmp_path / "runs"


def assert_one_sentence(done: Finished, place: str) -> None:
    assert done.returncode == 2, done.stderr
    said = done.stderr.strip().splitlines()[-1]
    assert "expected" in said and " found " in said and place in said, done.stderr


def files_of(storage: Path) -> list[Path]:
    return [path for path in storage.rglob("*") if path.is_file() and ".lease" not in path.parts]


@pytest.mark.parametrize("first", [0, 2])
def test_what_can_be_made_again_is_and_the_run_ends_the_same(copy: Path, first: int) -> None:
    best = json.loads((copy / "little" / "best.json").read_text())
    made = [path for path in files_of(copy) if path.name.endswith(MADE) and "model" not in path.parts]
    assert len(made) > 20
    made += [copy / "little" / "best.json", copy / "little" / "generations.jsonl"]
    for path, damage in zip(made, islice(cycle(DAMAGES.values()), first, None), strict=False):
        path.write_bytes(damage(path.read_bytes()))
    done = call_here("resume", copy / "little")
    assert done.returncode == 0, done.stderr
    again = json.loads((copy / "little" / "best.json").read_text())
    assert {key: again[key] for key in ("winner", "gguf_sha256", "rows")} == {
        key: best[key] for key in ("winner", "gguf_sha256", "rows")
    }


@pytest.mark.parametrize("name", NEEDED)
def test_what_cannot_be_made_again_is_one_sentence(copy: Path, name: str) -> None:
    whole = (copy / "little" / name).read_bytes()
    for damage in (DAMAGES["cut"], DAMAGES["another kind"]):
        (copy / "little" / name).write_bytes(damage(whole))
        done = call_here("resume", copy / "little")
        if done.returncode:  # a log cut at a line's end is one of an earlier time
            assert_one_sentence(done, name)


@pytest.mark.parametrize("command", READERS)
def test_every_reading_command_says_which_file_is_damaged(copy: Path, command: str) -> None:
    for path in files_of(copy):
        if not path.name.endswith(READERS[command]):
            continue
        whole = path.read_bytes()
        for kind, damage in DAMAGES.items():
            path.write_bytes(damage(whole))
            done = call_here(command, copy / "little")
            assert "Traceback" not in done.stderr and done.returncode in (0, 2), (path, kind, done.stderr)
            if done.returncode:
                assert_one_sentence(done, path.name)
        path.write_bytes(whole)
