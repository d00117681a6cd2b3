"""Splits are disjoint, unseen by training, spread over their text, and long enough."""

import re
from pathlib import Path

import numpy as np
import pytest

from evaluators.data.documents import TextError, divide_file, file_documents
from evaluators.data.stdlib import SPLITS, load_held_out, read_modules, training_documents
from evaluators.data.tokenizer import load_tokenizer
from evaluators.data.windows import TokenWindows, token_windows, windows_digest
from tests.conftest import EMBEDDED, SmallBank


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


def test_one_file_is_divided_into_disjoint_parts(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {n}\n" for n in range(100)))
    parts = divide_file(path, {"calibration": 0.4, "search": 0.2, "validation": 0.2, "test": 0.2})
    assert "".join(part[0] for part in parts.values()) == path.read_text()
    assert parts["calibration"][0].count("\n") == 40


def test_the_same_file_for_two_splits_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("text\n")
    with pytest.raises(TextError, match="splits must be disjoint"):
        file_documents({"search": path, "test": path})


def test_a_draw_is_a_new_order_of_all_windows_and_fewer_tokens_of_it_are_a_part_of_more() -> None:
    windows = TokenWindows({"search": np.arange(64).reshape(16, 4)}, "digest")
    whole = [windows.take("search", 64, draw) for draw in range(3)]
    assert all(sorted(rows[:, 0]) == sorted(whole[0][:, 0]) for rows in whole)
    assert not np.array_equal(whole[1], whole[2])
    assert np.array_equal(windows.take("search", 20, 2), whole[2][:5])
