"""Conversations become text by the model's own template, with its special tokens; files that hold none are refused."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluators.data.chat import chat_files, divide_chat
from evaluators.data.chat_template import render, turns
from evaluators.data.documents import TextError
from evaluators.data.stdlib import SPLITS
from evaluators.data.tokenizer import ModelTokenizer, load_tokenizer
from evaluators.data.turns import LONGEST_QUERY, Pen, script_of
from evaluators.data.windows import Part, token_windows
from tests.small_models import chat_tokenizer

SHARES = dict.fromkeys(SPLITS, 0.25)
TOKENS = {"calibration": 640, "search": 128, "validation": 128, "test": 128}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    folder = tmp_path_factory.mktemp("chat")
    chat_tokenizer().save_pretrained(folder)
    return load_tokenizer(folder)


def exchange(number: object) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"what is {number}"}, {"role": "assistant", "content": f"{number} it is"}]


def written(path: Path, lines: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_conversations_keep_the_templates_special_tokens_and_one_bos(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    file = written(tmp_path / "c.jsonl", [{"messages": exchange(name)} for name in SPLITS for _ in range(25)])
    texts = {split: [Part(rows)] for split, rows in divide_chat(file, SHARES, tokenizer).items()}
    found = token_windows(tokenizer, texts, 64, TOKENS, seed=0)
    start, end = (tokenizer.backend.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    for rows in found.windows.values():
        assert (rows[:, 0] == tokenizer.bos).all() and not (rows[:, 1:] == tokenizer.bos).any()
        assert (rows == start).any(axis=1).all() and (rows == end).any(axis=1).all()
        assert not (rows == tokenizer.eos).any(), "a conversation's own tokens end it"
    for split, rows in found.windows.items():
        assert {name for name in SPLITS if f"what is {name}" in " ".join(map(tokenizer.decode, rows))} == {split}
    assert "what is test\ntest it is" in found.sample and "im_start" not in found.sample


def test_of_many_conversations_evenly_spread_ones_are_read(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    file = written(tmp_path / "c.jsonl", [{"messages": exchange(n)} for n in range(4000)])
    rows = divide_chat(file, SHARES, tokenizer)["calibration"]
    read: list[int] = []
    cut = replace(rows, row=lambda index: read.append(index) or rows.row(index)).cut(tokenizer, 10, 63, "calibration")  # type: ignore[func-returns-value]
    assert cut.shape == (10, 63) and len(read) < 200 and min(read) == 0 and max(read) == 999
    assert np.array_equal(cut, rows.cut(tokenizer, 10, 63, "calibration"))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("plain text", r"line 2 of .*: expected a JSON object, found none"),
        ('{"text": "no"}', r"line 2 of .*: expected messages, found none among its keys text"),
        ('["messages"]', r"line 2 of .*: expected an object with messages, found a list"),
        ('{"messages": "hello"}', r"line 2 of .*: expected a list of messages, found 'hello'"),
        ('{"messages": []}', r"line 2 of .*: expected a list of messages, found \[\]"),
        ('{"messages": [{"content": "a"}]}', r"line 2 of .*: expected messages with role and content, found"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": 5}', r"line 2 of .*: expected a list of tools"),
        (None, r"expected enough rows in .* for every split, found 1, and none for"),
    ],
)
def test_a_file_of_something_else_is_refused_by_its_line(
    second: str | None, message: str, tokenizer: ModelTokenizer, tmp_path: Path
) -> None:
    first = json.dumps({"messages": exchange(0)})
    (tmp_path / "c.jsonl").write_text("\n".join([first, *([second] if second else []), ""]))
    with pytest.raises(TextError, match=message):
        divide_chat(tmp_path / "c.jsonl", SHARES, tokenizer)


def test_missing_and_shared_files_and_models_without_template_are_refused(
    tokenizer: ModelTokenizer, tmp_path: Path
) -> None:
    file = written(tmp_path / "c.jsonl", [{"messages": exchange(0)}])
    with pytest.raises(TextError, match="found nothing at"):
        divide_chat(tmp_path / "no.jsonl", SHARES, tokenizer)
    with pytest.raises(TextError, match="found the same file twice"):
        chat_files({"search": file, "test": file}, tokenizer)
    with pytest.raises(TextError, match="line 1 of .*: expected a model with a chat template, found one without"):
        chat_files({"test": file}, replace(tokenizer, chat_template=None))
    refusing = replace(tokenizer, chat_template="{{ raise_exception('no users here') }}")
    with pytest.raises(TextError, match="line 1 of .*the model's chat template takes, found: no users here"):
        chat_files({"test": file}, refusing)


def test_a_template_that_writes_the_day_writes_the_same_one_always(tokenizer: ModelTokenizer) -> None:
    dated = replace(tokenizer, chat_template="{{ strftime_now('%d %b %Y') }}: {{ messages[0]['content'] }}")
    assert render(dated, [{"role": "user", "content": "hi"}]) == "01 Jan 2026: hi"


def test_turns_of_the_template_stand_around_what_the_model_writes(tokenizer: ModelTokenizer) -> None:
    found = turns(tokenizer)
    assert found is not None
    assert found.before + found.after_user == "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    script = script_of(tokenizer)
    end = tokenizer.backend.token_to_id("<|im_end|>")
    assert script.start[0] == tokenizer.bos and tokenizer.bos not in script.start[1:]
    pen, word = Pen(script), 300
    ids = [pen.next(word), *(pen.next(end) for _ in script.breaks[0]), pen.next(word), *map(pen.next, [end] * 4)]
    text = tokenizer.backend.decode(ids, skip_special_tokens=False)
    assert text.count("<|im_end|>") == 2 and text.index("assistant") < text.rindex("<|im_end|>")
    talking = Pen(script)
    told = [talking.next(word) for _ in range(LONGEST_QUERY + 2)]
    assert told[LONGEST_QUERY] == end, "a user's turn has an end"
    ended = Pen(script)
    assert [ended.next(word), ended.next(tokenizer.special["eos"])][1] == end, "by the template's own token"


def test_a_template_without_end_tokens_has_lines_as_user_turns_and_a_model_without_one_goes_on(
    tokenizer: ModelTokenizer,
) -> None:
    lines = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    script = script_of(replace(tokenizer, chat_template=lines))
    newline = tokenizer.backend.token_to_id("<0x0A>")
    assert newline in script.ends[0] and newline not in script.ends[1]
    bare = replace(tokenizer, chat_template=None)
    assert script_of(bare).start == (tokenizer.bos,) and not script_of(bare).breaks
    with pytest.raises(TextError, match="expected a chat template or a BOS or EOS token"):
        script_of(replace(bare, special={}, prefix=()))
