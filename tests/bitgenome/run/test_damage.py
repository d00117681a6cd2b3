"""A damaged file of a run is made again where that is possible, and is one sentence where it is not."""

import json
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import pytest

from tests.bitgenome.conftest import assert_one_sentence, call_here

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
    "report": ("run.json", "evaluations.jsonl", "generations.jsonl", "best.json", "sensitivity.parquet"),
    "verify": ("run.json", "best.json", "windows.safetensors", ".gguf"),
}


def files_of(storage: Path) -> list[Path]:
    return [path for path in storage.rglob("*") if path.is_file() and ".lease" not in path.parts]


@pytest.mark.parametrize("first", [0, 2])
def test_what_can_be_made_again_is_and_the_run_ends_the_same(little: Path, first: int) -> None:
    best = json.loads((little / "little" / "best.json").read_text())
    models = {"model", "m" * 240}  # a scaled view, and the folder of ``little``
    made = [path for path in files_of(little) if path.name.endswith(MADE) and not models & set(path.parts)]
    assert len(made) > 20
    made += [little / "little" / "best.json", little / "little" / "generations.jsonl"]
    for path, damage in zip(made, islice(cycle(DAMAGES.values()), first, None), strict=False):
        path.write_bytes(damage(path.read_bytes()))
    done = call_here("resume", little / "little")
    assert done.returncode == 0, done.stderr
    again = json.loads((little / "little" / "best.json").read_text())
    assert {key: again[key] for key in ("winner", "gguf_sha256", "rows")} == {
        key: best[key] for key in ("winner", "gguf_sha256", "rows")
    }


@pytest.mark.parametrize("name", NEEDED)
def test_what_cannot_be_made_again_is_one_sentence(little: Path, name: str) -> None:
    whole = (little / "little" / name).read_bytes()
    for damage in (DAMAGES["cut"], DAMAGES["another kind"]):
        (little / "little" / name).write_bytes(damage(whole))
        done = call_here("resume", little / "little")
        if done.returncode:  # a log cut at a line's end is one of an earlier time
            assert_one_sentence(done, name)


@pytest.mark.parametrize("command", READERS)
def test_every_reading_command_says_which_file_is_damaged(little: Path, command: str) -> None:
    for path in files_of(little):
        shared = "shared" in path.parts and path.name != "manifest.json"  # no command but resume reads these
        if shared or not path.name.endswith(READERS[command]):
            continue
        whole = path.read_bytes()
        for kind, damage in DAMAGES.items():
            path.write_bytes(damage(whole))
            done = call_here(command, little / "little")
            assert "Traceback" not in done.stderr and done.returncode in (0, 2), (path, kind, done.stderr)
            if done.returncode:
                assert_one_sentence(done, path.name)
        path.write_bytes(whole)
