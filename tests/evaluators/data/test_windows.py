"""Splits are disjoint, unseen by training, spread over their text, and long enough."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from evaluators.data import documents
from evaluators.data import texts as texts_module
from evaluators.data.documents import TextError, file_documents
from evaluators.data.stdlib import SPLITS, load_held_out, read_modules, training_documents
from evaluators.data.tokenizer import ModelTokenizer, load_tokenizer
from evaluators.data.windows import TokenWindows, scored, token_windows, windows_digest
from tests.conftest import EMBEDDED, SmallBank
from tests.small_models import sentencepiece_tokenizer


def test_splits_share_no_module_with_each_other_or_with_training() -> None:
    held_out = load_held_out(EMBEDDED / "splits.json")
    modules = [name for split in SPLITS for name in held_out[split]]
    assert len(modules) == len(set(modules)) == sum(len(read_modules(held_out[split])) for split in SPLITS)
    trained = {Path(name).parts[0].removesuffix(".py") for name, _ in training_documents(modules)}
    assert len(trained) > 100
    assert not trained & set(modules)


def test_windows_reach_over_the_whole_text_and_do_not_repeat() -> None:
    tokenizer = load_tokenizer(EMBEDDED)
    text = "".join(f"value_{n} = {n}\n" for n in range(3000))
    rows = token_windows(tokenizer, {"test": [text]}, 32, {"test": 320}, seed=0).windows["test"]
    assert rows.shape == (10, 32)
    seen = [int(number) for row in rows for number in re.findall(r"= (\d+)\n", tokenizer.decode(row))]
    assert min(seen) < 10 and max(seen) > 2980
    assert all(any(300 * part <= number < 300 * (part + 1) for number in seen) for part in range(10))
    assert len({tuple(row) for row in rows}) == 10


def test_the_digest_changes_with_the_text_and_survives_the_file(small_bank: SmallBank) -> None:
    loaded = TokenWindows.load(small_bank.windows_file)
    assert loaded.digest == small_bank.windows.digest
    changed = {**small_bank.windows.windows}
    changed["test"] = changed["test"].copy()
    changed["test"][0, 0] ^= 1
    assert loaded.digest != windows_digest(changed)


def test_too_little_text_is_refused_with_both_numbers() -> None:
    tokenizer = load_tokenizer(EMBEDDED)
    with pytest.raises(TextError, match=r"expected at least 4096 tokens of search text, found \d+: lower text.tokens"):
        token_windows(tokenizer, {"search": ["import os\n"]}, 512, {"search": 4096}, seed=0)


def test_windows_begin_with_bos_where_the_tokenizer_puts_it_and_else_stay_as_they_were(tmp_path: Path) -> None:
    text = "".join(f"value_{n} = {n}\n" for n in range(300))
    sentencepiece_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    windows = token_windows(tokenizer, {"test": [text]}, 32, {"test": 320}, seed=0)
    rows = windows.windows["test"]
    assert rows.shape == (10, 32) and windows.unscored == 1
    assert (rows[:, 0] == tokenizer.special["bos"]).all()
    plain = [*tokenizer.encode([text])[0], tokenizer.eos]
    pieces = {tuple(plain[start : start + 31]) for start in range(0, len(plain), 31)}
    assert {tuple(row) for row in rows[:, 1:].tolist()} <= pieces
    (tmp_path / "windows").write_bytes(windows.to_bytes())
    loaded = TokenWindows.load(tmp_path / "windows")
    assert (loaded.unscored, loaded.digest, loaded.sample) == (1, windows.digest, windows.sample)
    assert scored(rows, loaded.unscored).shape == (10, 31)
    without = token_windows(load_tokenizer(EMBEDDED), {"test": [text]}, 32, {"test": 320}, seed=0)
    assert without.unscored == 0
    assert without.digest == "efb64f72630ff5f65631505d498c6faee78da5f7b1da1b3dbbd102a2a43190d2"


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer: ModelTokenizer):
        self.bos, self.eos, self.read = tokenizer.bos, tokenizer.eos, 0
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        self.read += sum(map(len, texts))
        return self._tokenizer.encode(texts)


def test_of_a_large_text_evenly_spread_slices_are_read_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts_module, "WHOLE_TEXT", 10_000)
    monkeypatch.setattr(documents, "WHOLE_FILE", 10_000)
    tokenizer, read = load_tokenizer(EMBEDDED), []
    for lines in (20_000, 80_000):
        path = tmp_path / f"{lines}.txt"
        path.write_text("".join(f"value_{n} = {n}\n" for n in range(lines)))
        counting = Counting(tokenizer)
        found = token_windows(counting, file_documents({"test": path}), 64, {"test": 640}, seed=0)  # type: ignore[arg-type]
        rows = found.windows["test"]
        seen = [int(number) for row in rows for number in re.findall(r"= (\d+)\n", tokenizer.decode(row))]
        assert all(any(lines * i <= 10 * n < lines * (i + 1) for n in seen) for i in range(10))
        in_memory = token_windows(tokenizer, {"test": [path.read_text()]}, 64, {"test": 640}, seed=0)
        assert found.digest == in_memory.digest, "pieces of a file are those of its text"
        read.append(counting.read)
    assert max(read) < 10 * 64 * texts_module.CHARACTERS * 2


def test_slices_go_on_over_the_end_of_a_document_and_blank_ones_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = load_tokenizer(EMBEDDED)
    empty = [" " * 3000, "".join(f"{n} " for n in range(800))]
    whole = token_windows(tokenizer, {"test": empty}, 64, {"test": 1536}, seed=0)
    monkeypatch.setattr(texts_module, "WHOLE_TEXT", 5000)
    again = token_windows(tokenizer, {"test": empty}, 64, {"test": 1536}, seed=0)
    assert again.digest == whole.digest, "all is read where slices do not suffice"
    counting = Counting(tokenizer)
    blank = [" " * 100_000, "".join(f"{n} " for n in range(20_000))]
    found = token_windows(counting, {"test": blank}, 64, {"test": 640}, seed=0)  # type: ignore[arg-type]
    assert found.windows["test"].shape == (10, 64) and counting.read < 150_000, "a part of what is not blank"
    short = [f"document {n} " + "x = 1\n" * 5 for n in range(300)]
    rows = token_windows(tokenizer, {"test": short}, 64, {"test": 640}, seed=0).windows["test"]
    assert (rows == tokenizer.eos).any(axis=1).all()


def test_a_draw_is_a_new_order_of_all_windows_and_fewer_tokens_of_it_are_a_part_of_more() -> None:
    windows = TokenWindows({"search": np.arange(64).reshape(16, 4)}, "digest")
    whole = [windows.take("search", 64, draw) for draw in range(3)]
    assert all(sorted(rows[:, 0]) == sorted(whole[0][:, 0]) for rows in whole)
    assert not np.array_equal(whole[1], whole[2])
    assert np.array_equal(windows.take("search", 20, 2), whole[2][:5])
