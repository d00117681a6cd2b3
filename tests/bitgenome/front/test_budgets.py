"""A file of another size comes from what a finished run knows: no calibration, no bank, and the run stays as it is."""

import json
import shutil
from pathlib import Path

import pytest

from bitgenome.common import layout
from bitgenome.common.digests import digest_of_file
from tests.bitgenome.conftest import Runs, assert_one_sentence, call_here


def content(run: Path) -> dict[str, str]:
    return {path.name: digest_of_file(path) for path in run.iterdir() if path.is_file()}


def test_another_size_is_a_run_beside_the_first_proved_healed_and_the_same_again(little: Path, tmp_path: Path) -> None:
    run, made = little / "little", little / "half"
    for kind in ("calibration", "sensitivity"):  # as `prune --finished` leaves it
        shutil.rmtree(little / "shared" / kind)
    before, shared = content(run), sorted(path for path in (little / "shared").rglob("*") if path.is_file())
    sizes = json.loads(call_here("front", run, "--json").stdout)
    wanted = (sizes["smallest"] + json.loads((run / layout.BEST).read_text())["gguf_bytes"]) // 2
    command = ("export", run, "--size", str(wanted), "--name", "half", "--heal")
    command += ("--set", "healing.steps=2", "--set", "llamacpp_mix=off")
    copy = tmp_path / "copy.gguf"
    done = call_here(*command, "-o", copy)
    assert done.returncode == 0, done.stderr
    best, record = (json.loads((made / name).read_text()) for name in (layout.BEST, layout.RECORD))
    assert best["gguf_bytes"] <= wanted and best["proof"]["figures"] and best["healing"] is not None
    assert copy.read_bytes() == (made / best["gguf"]).read_bytes()
    assert record["parent"] == "little" and "calibration" not in record["stages"] and "bank" not in record["stages"]
    assert content(run) == before
    assert sorted(path for path in (little / "shared").rglob("*") if path.is_file()) == shared
    assert any("from little" in row["name"].split(" = ") for row in best["rows"])
    again = call_here(*command)
    assert again.returncode == 0, again.stderr
    repeated = json.loads((made / layout.BEST).read_text())
    assert repeated["gguf_sha256"] == best["gguf_sha256"] and repeated["winner"] == best["winner"]
    listed = json.loads(call_here("front", run, "--json").stdout)["sizes"]
    assert [size["measured"] for size in listed if size["notes"] and size["notes"][0].startswith("half")] == [True]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (("--bits", "1.5"), "lie between 6.7137 bits per weight (79,328 bytes) and 9.7034 bits per weight"),
        (("--size", "9GB"), "size 9GB"),
        (("--size", "much"), "much"),
        (("--size", "3MB", "--bits", "3"), "found 2"),
        (("--heal",), "expected a size"),
        (("--like", "Q9"), "for --like"),
        (("--bits", "8", "--set", "text.window=32"), "text.window"),
        (("--bits", "8", "--name", "little"), "the run itself"),
        (("--bits", "8", "-o", "/nowhere/x.gguf"), "/nowhere"),
    ],
)
def test_what_cannot_be_made_is_refused_and_leaves_nothing(little: Path, options: tuple[str, ...], found: str) -> None:
    before = sorted(path.name for path in little.iterdir())
    done = call_here("export", little / "little", *options)
    said = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and found in said and "Traceback" not in done.stderr, done.stderr
    assert sorted(path.name for path in little.iterdir()) == before


def test_a_run_that_is_not_finished_has_no_other_sizes(runs: Runs, little: Path) -> None:
    (little / "little" / layout.BEST).unlink()
    for command in (("export", "--bits", "8"), ("front",)):
        assert_one_sentence(call_here(command[0], little / "little", *command[1:]), "bitgenome resume")
