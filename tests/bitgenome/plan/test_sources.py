"""Sources of text mix by their shares, the model writes what is wanted of it, and what cannot be is refused early."""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from bitgenome.batch.config import load_batch
from bitgenome.common import layout
from bitgenome.common.errors import UserError
from bitgenome.config.run import RunConfig, absolute_paths, parse_config
from bitgenome.plan.forecast import rates_task
from bitgenome.plan.memory import check_memory, stage_memory
from bitgenome.plan.plan import Plan, make_plan
from bitgenome.plan.text import keep_windows, read_windows, ready_windows
from bitgenome.run.writing import written_windows
from evaluators.data.windows import TokenWindows, divided
from tests.bitgenome.conftest import LITTLE, call_here
from tests.small_models import chat_tokenizer, save_small_model
from workers.pool.base import SerialPool

LINES = "".join(f"value_{n} = {n}  # some text to read\n" for n in range(2000))
CHAT = [{"messages": [{"role": "user", "content": "an apple " * 9}]} for _ in range(200)]
TOKENS = {"calibration": 512, "sensitivity": 64, "search": 256, "validation": 128, "test": 128}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model that takes chats, and text of both kinds."""
    folder = tmp_path_factory.mktemp("sources")
    save_small_model(folder / "model", "llama", tokenizer=False)
    chat_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(LINES)
    (folder / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in CHAT))
    return {name: folder / name for name in ("model", "text.txt", "chat.jsonl", "runs")}


def configured(files: dict[str, Path], bits: float = 6.3, **text: Any) -> RunConfig:
    """A configuration of little text."""
    settings = LITTLE | {"name": "mine", "storage_path": str(files["runs"]), "budget": {"bits_per_weight": bits}}
    settings |= {"model": str(files["model"]), "levels": ["W2", "W4"], "workers": {"ray": "off"}}
    return absolute_paths(parse_config(settings | {"text": {"window": 64, "tokens": TOKENS} | text}, "here"))


def planned(files: dict[str, Path], **text: Any) -> Plan:
    return make_plan(configured(files, **text))


def all_windows(plan: Plan) -> TokenWindows:
    """The text of a plan, written where the model is to write."""
    return written_windows(
        plan, ready_windows(plan), SerialPool(), lambda items, *_: iter(items), lambda _: nullcontext()
    )


def test_whole_numbers_of_windows_follow_the_shares() -> None:
    assert divided(10, [1, 1]) == [5, 5] and divided(3, [1, 1]) == [2, 1] and divided(1, [0.2, 0.8]) == [0, 1]
    for count in range(1, 40):
        found = divided(count, [0.5, 0.3, 0.2])
        assert sum(found) == count and all(abs(n - count * s) < 1 for n, s in zip(found, [0.5, 0.3, 0.2], strict=True))


def test_a_mix_holds_each_source_by_its_share_and_self_only_where_nothing_is_measured(files: dict[str, Path]) -> None:
    sources = [
        {"source": "file", "path": str(files["text.txt"]), "share": 2},
        {"source": "chat", "path": str(files["chat.jsonl"])},
        {"source": "self"},
    ]
    plan = planned(files, source=sources)
    found = all_windows(plan)
    tokenizer = chat_tokenizer()
    kinds = {}
    for split, rows in found.windows.items():
        texts = [tokenizer.decode(row) for row in rows]
        file, chat = sum("# some" in text for text in texts), sum("an apple an" in text for text in texts)
        kinds[split] = (file, chat, len(texts) - file - chat)
    assert kinds == {"calibration": (4, 2, 2), "search": (2, 1, 1), "validation": (1, 1, 0), "test": (1, 1, 0)}
    assert found.digest == all_windows(plan).digest and "an apple" in found.sample and "# some" in found.sample
    assert plan.config.text.names == "file (2), chat (1), self (1)"
    moved = [{**s, "path": f"/elsewhere/{s['path']}"} if "path" in s else s for s in sources]
    assert configured(files, source=moved).digest == plan.config.digest, "paths do not decide a result"
    assert configured(files, source=sources[:2]).digest != plan.config.digest


def test_a_model_alone_suffices_and_its_text_is_written_once(
    files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    plan = planned(files, source="self")
    assert ready_windows(plan) is None
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plan.config.model_dump(mode="json", exclude={"storage_url"})))
    (run,) = load_batch([tmp_path / "run.yaml"])
    assert run.windows is None and not run.finished, "the first run of a batch writes for all"
    with pytest.raises(UserError, match="expected text that is written already"):
        read_windows(plan)
    assert "text" in stage_memory(plan) and rates_task(plan).writes
    windows = all_windows(plan)
    assert "the model writes 16 windows of 64 tokens for calibration, search, validation, test: figures" in caplog.text
    assert {split: len(rows) for split, rows in windows.windows.items()} == {
        "calibration": 8, "search": 4, "validation": 2, "test": 2,
    }  # fmt: skip
    every = np.concatenate([*windows.windows.values()])
    assert len(np.unique(every, axis=0)) == 16, "splits are disjoint"
    written = files["runs"] / layout.SHARED / layout.WRITTEN_KIND
    times = {file: file.stat().st_mtime_ns for file in written.rglob("*.safetensors")}
    assert all_windows(plan).digest == windows.digest
    assert times == {file: file.stat().st_mtime_ns for file in written.rglob("*.safetensors")}
    keep_windows(plan, windows)
    found = ready_windows(plan)
    assert found is not None and found.digest == windows.digest
    assert all_windows(planned(files, source="self", seed=1)).digest != windows.digest
    config = plan.config.model_copy(update={"evaluation": plan.config.evaluation.model_copy(update={"memory": 1000})})
    with pytest.raises(UserError, match="memory"):
        check_memory(replace(plan, config=config))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"source": "chat"}, "expected text.path or text.files for source: chat, found none"),
        ({"source": "datasets"}, "expected text.dataset for source: datasets, found none"),
        ({"source": "chta"}, "'stdlib', 'file'.* found 'chta'"),
        ({"source": [{"source": "fil"}]}, r"text.source.0.source in here: Input should be 'stdlib'"),
        ({"source": [{"source": "self", "shar": 1}]}, r"unknown key 'text.source.0.shar' .* did you mean"),
        ({"source": []}, "expected a source that fills calibration, found none"),
        ({"source": [{"source": "self", "fills": ["search"]}]}, "expected a source that fills calibration, found none"),
        ({"source": [{"source": "self"}, {"source": "self"}]}, "expected self once in a mix"),
        ({"source": [{"source": "self"}], "path": "a.txt"}, "expected text.path within the sources of a mix"),
        ({"source": [{"source": "chat", "path": "FILE"}, {"source": "file", "path": "FILE"}]}, "a file of its own for"),
        ({"source": [{"source": "self"}, {"source": "chat", "path": "/no"}]}, "found nothing at /no"),
        ({"source": [{"source": "self"}, {"source": "file", "path": "SHORT"}]}, "expected at least .* tokens of"),
        ({"source": "self", "window": 8}, "expected text.window at least twice"),
        ({"source": "datasets", "dataset": {"id": "/no/data"}}, "data|package datasets"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_sentence_before_any_work(
    text: dict[str, Any], message: str, files: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("short\n" * 5)
    names = {"FILE": str(files["chat.jsonl"]), "SHORT": str(tmp_path / "short.txt")}
    settings = json.loads(json.dumps(text))
    for source in [s for s in settings["source"] if "path" in s]:
        source["path"] = names.get(source["path"], source["path"])
    with pytest.raises(UserError, match=message) as error:
        ready_windows(planned({**files, "runs": tmp_path / "runs"}, **settings))
    assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()


def test_a_model_without_chat_template_reads_no_chats_and_others_are_warned_of_python(
    files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_small_model(tmp_path / "model", "llama")
    bare = {**files, "model": tmp_path / "model"}
    with pytest.raises(UserError, match="expected a model with a chat template for source: chat, found none in"):
        planned(bare, source="chat", path=str(files["chat.jsonl"]))
    planned(bare, source="self")
    assert "Python" not in caplog.text
    splits = LITTLE["text"]["splits"]  # type: ignore[call-overload]
    planned(bare, source="stdlib", splits=splits)
    assert "text.source: stdlib is Python code, on which model would be calibrated" in caplog.text
    caplog.clear()
    make_plan(configured({**files, "model": Path(str(LITTLE["model"]))}, 3.5, source="stdlib", splits=splits))
    assert "Python" not in caplog.text


def test_a_data_set_needs_its_library_and_a_column_of_text_or_messages(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="expected the package datasets for source: datasets, found none: pip install"):
        ready_windows(planned(files, source="datasets", dataset={"id": str(tmp_path)}))
    monkeypatch.undo()
    pytest.importorskip("datasets")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line | {"said": "a plum " * 9}) + "\n" for line in CHAT))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer = chat_tokenizer()
    for column, word in ((None, "an apple"), ("said", "a plum")):
        found = read_windows(planned(files, source="datasets", dataset={"id": str(tmp_path), "column": column}))
        assert all(word in tokenizer.decode(row) for rows in found.windows.values() for row in rows)
        marked = any((rows == tokenizer.convert_tokens_to_ids("<|im_start|>")).any() for rows in found.windows.values())
        assert marked == (column is None)
    with pytest.raises(
        UserError, match=r"expected a column other in .*, train, found messages, said: choose by column"
    ):
        read_windows(planned(files, source="datasets", dataset={"id": str(tmp_path), "column": "other"}))


@pytest.mark.long
def test_a_run_without_any_text_ends_in_a_proved_file_and_the_next_writes_nothing(tmp_path: Path) -> None:
    settings = LITTLE | {"storage_path": str(tmp_path / "runs"), "budget": {"bits_per_weight": 3.5}}
    settings |= {"text": LITTLE["text"] | {"source": "self"}, "workers": {"ray": "off"}}  # type: ignore[operator]
    written = tmp_path / "runs" / layout.SHARED / layout.WRITTEN_KIND
    times: list[dict[Path, int]] = []
    digests = []
    for name in ("first", "second"):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings | {"name": name}))
        done = call_here("run", tmp_path / "c.yaml")
        assert done.returncode == 0, done.stderr
        record = json.loads((tmp_path / "runs" / name / layout.RECORD).read_text())
        assert ("text" in record["stages"]) == (name == "first") and record["forecast"]["text"] > 0
        digests.append(record["digests"]["text"])
        assert json.loads((tmp_path / "runs" / name / layout.BEST).read_text())["proof"]
        times.append({file: file.stat().st_mtime_ns for file in written.rglob("*.safetensors")})
    assert times[0] == times[1] and times[0] and digests[0] == digests[1]
