"""A run's text is read once: what was encoded is read again by its resumption and by other runs of the same text."""

from pathlib import Path

import pytest
import yaml

from bitgenome.common import layout
from bitgenome.common.errors import UserError
from bitgenome.config.run import RunConfig, load_config
from bitgenome.plan import text as text_module
from bitgenome.plan.plan import Plan, make_plan
from bitgenome.plan.text import keep_windows, read_windows, windows_of_run
from bitgenome.storage.run_record import RunRecord
from evaluators.data.windows import TokenWindows
from tests.bitgenome.conftest import LITTLE, call_here
from tests.conftest import EMBEDDED

LINES = "".join(f"value_{n} = {n}  # some text to read\n" for n in range(2000))


def written(folder: Path, text: Path) -> Path:
    """A configuration of little text from one file."""
    (folder / "c.yaml").write_text(
        yaml.safe_dump(
            LITTLE
            | {"name": "mine", "storage_path": str(folder / "runs"), "budget": {"bits_per_weight": 3.5}}
            | {"text": LITTLE["text"] | {"source": "file", "path": str(text)}, "workers": {"ray": "off"}}  # type: ignore[operator]
        )
    )
    return folder / "c.yaml"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(LINES)
    return tmp_path / "text.txt"


def begun(plan: Plan, windows: TokenWindows) -> Path:
    """The directory of a run that has evaluated something; returns its file of windows."""
    config: RunConfig = plan.config
    directory = config.storage_path / config.name
    directory.mkdir(parents=True)
    record = RunRecord.begin(directory / layout.RECORD, config)
    record.pin("text", windows.digest)
    (directory / layout.EVALUATIONS).touch()
    (directory / layout.WINDOWS).write_bytes(windows.to_bytes())
    return directory / layout.WINDOWS


def test_a_run_goes_on_with_the_windows_it_was_begun_with(
    text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_plan(load_config(written(tmp_path, text)))
    assert windows_of_run(plan.config) is None, "it begins now"
    windows = read_windows(plan)
    file = begun(plan, windows)
    text.unlink()
    found = windows_of_run(make_plan(load_config(written(tmp_path, text))).config)
    assert found is not None and (found.digest, found.sample) == (windows.digest, windows.sample)
    for damaged in (file.read_bytes()[:-8], b"", file.read_bytes()[:-8] + b"\x01" * 8):
        file.write_bytes(damaged)
        assert windows_of_run(plan.config) is None
        assert "windows.safetensors is missing or damaged: reading the text again" in caplog.text
        caplog.clear()
    with pytest.raises(UserError, match=r"expected a file for text.path, found nothing at .*text.txt"):
        read_windows(plan)


def test_runs_of_the_same_text_encode_it_once(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(load_config(written(tmp_path, text)))
    windows = read_windows(plan)
    assert not (tmp_path / "runs").exists(), "reading leaves nothing behind"
    keep_windows(plan, windows)
    calls = []
    monkeypatch.setattr(text_module, "encode_text", lambda plan: calls.append(plan) or windows)
    assert read_windows(plan).digest == windows.digest and not calls
    text.write_text(LINES + "more\n")
    read_windows(plan)
    assert calls, "another text is encoded anew"


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(LINES.encode("utf-16"), "expected UTF-8 text in"), (b"short\n", "at least 1024 tokens of calibration text")],
)
def test_a_text_that_cannot_be_used_is_refused_before_any_work(
    command: str, content: bytes, message: str, text: Path, tmp_path: Path
) -> None:
    text.write_bytes(content)
    done = call_here(command, written(tmp_path, text))
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("content", ["[]", "{", '{"test": 5}'])
def test_a_broken_list_of_modules_is_one_sentence(content: str, tmp_path: Path) -> None:
    splits = tmp_path / "splits.json"
    splits.write_text(content)
    path = written(tmp_path, splits)
    path.write_text(
        path.read_text().replace("source: file", "source: stdlib").replace(str(EMBEDDED / "splits.json"), str(splits))
    )
    with pytest.raises(UserError, match=r"expected lists of modules for .* in .*splits.json, found none"):
        read_windows(make_plan(load_config(path)))
