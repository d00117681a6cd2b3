"""Every message of docs/troubleshooting.md is what the command line says."""

import re
from collections.abc import Callable
from pathlib import Path

import yaml

from bitgenome.common import layout
from tests.bitgenome.conftest import LITTLE, Finished, call_here
from tests.conftest import REPOSITORY
from tests.small_models import save_small_model

MESSAGE = re.compile(r"^### `(.+)`$", re.MULTILINE)


def messages() -> list[str]:
    """The messages of the page as regular expressions."""
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return [".+".join(map(re.escape, message.split("…"))) for message in MESSAGE.findall(page)]


def test_every_message_of_the_page_is_made(little: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load((little / "little.yaml").read_text())
    few, other = tmp_path / "few.txt", save_small_model(tmp_path / "phi3", "phi3")
    few.write_text("few words")

    def planned(**changes: object) -> Finished:
        path = tmp_path / "changed.yaml"
        path.write_text(yaml.safe_dump({**settings, **changes}))
        return call_here("plan", path)

    def verified_after(change: Callable[[Path], object]) -> Finished:
        change(little / "little")
        return call_here("verify", little / "little")

    def file_of(run: Path) -> Path:
        return max(run.glob("*.gguf"), key=lambda file: file.stat().st_size)  # the other is imatrix.gguf

    def cut(run: Path) -> None:
        file = file_of(run)
        file.write_bytes(file.read_bytes()[:-1])

    done = [
        call_here("run", tmp_path / "none.yaml"),
        planned(serch={}),
        planned(levels=["W4", "W99"]),
        planned(budget={"bits_per_weight": 1}),
        planned(model=str(tmp_path / "nowhere")),
        planned(model=str(other)),
        planned(template=str(file_of(little / "little"))),
        planned(text={"source": "file", "path": str(few), "window": 64}),
        planned(text={**LITTLE["text"], "window": 1000}),
        call_here("status", tmp_path / "nowhere"),
        call_here("run", little / "little.yaml", "--set", "search.seed=7"),
        verified_after(cut),
        verified_after(lambda run: (run / layout.BEST).unlink()),
    ]
    assert [call.returncode for call in done] == [2] * len(done)
    said = [call.stderr.strip().splitlines()[-1] for call in done]
    for message in messages():
        assert any(re.search(f"error: {message}$", line) for line in said), (message, said)
