"""What a model writes is drawn from its own distribution, and is the same whoever writes which part of it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from evaluators.data.documents import TextError
from evaluators.data.tokenizer import load_tokenizer
from evaluators.model.folder import ModelFolder
from evaluators.prepare.writing import BATCH, First, Writer, batches, drawn, tasks, writing_script, written_rows
from tests.conftest import EMBEDDED
from tests.small_models import chat_tokenizer, save_small_model

COUNTS, LENGTH = {"calibration": 2 * BATCH + 3, "test": 2}, 16


def test_tokens_are_drawn_as_often_as_the_model_says() -> None:
    p = torch.tensor([0.5, 0.25, 0.0, 0.2, 0.05])
    draws = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    found = drawn(p.log().expand(1000, 5), draws)
    assert (torch.bincount(found, minlength=5) / 1000 - p).abs().max() < 2e-3
    assert drawn(p.log()[None], torch.tensor([1.0], dtype=torch.float64)) < 5


def test_first_tokens_are_different_ones_likely_ones_first_and_never_forbidden() -> None:
    scores = torch.linspace(0, 12, 100)
    first = [First(0, 40, range(40), [99]).choose(scores), First(1, 40, range(40), [99]).choose(scores)]
    for tokens in first:
        assert len(set(tokens)) == 40 and 99 not in tokens and np.mean(tokens) > 65
    assert first[0] != first[1]
    parts = [First(0, 40, part, [99]).choose(scores) for part in (range(25), range(25, 40))]
    assert parts[0] + parts[1] == first[0]
    few = First(0, 10, range(10), range(96)).choose(scores)
    assert set(few) == {96, 97, 98, 99} and len(few) == 10


def test_the_text_is_the_same_for_any_number_of_workers_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    found = {}
    for workers in (1, 3):
        directory = tmp_path / str(workers)
        directory.mkdir()
        parts = tasks(EMBEDDED, directory, COUNTS, LENGTH, 0, workers)
        assert len(parts) == workers
        for index, task in enumerate(parts):
            assert written_rows(directory, COUNTS, LENGTH) is None
            task.run({})
            assert len(list(directory.iterdir())) == (index + 1) * 3 // workers
        rows = written_rows(directory, COUNTS, LENGTH)
        assert rows is not None
        found[workers] = rows
    assert all(np.array_equal(found[1][split], found[3][split]) for split in COUNTS)
    assert {split: len(rows) for split, rows in found[1].items()} == COUNTS
    every = np.concatenate([*found[1].values()])
    assert len({row.tobytes() for row in every}) == len(every)
    last = directory / batches(sum(COUNTS.values()))[-1].file
    last.write_bytes(last.read_bytes()[:-8])
    (again,) = tasks(EMBEDDED, directory, COUNTS, LENGTH, 0, 2)
    assert [batch.count for batch in again.batches] == [5]
    again.run({})
    rows = written_rows(directory, COUNTS, LENGTH)
    assert rows is not None and np.array_equal(rows["test"], found[3]["test"])


def test_a_chat_model_writes_turns_of_its_template_and_no_unused_ids(tmp_path: Path) -> None:
    save_small_model(tmp_path, "llama", tokenizer=False)
    chat_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    script = writing_script(tmp_path, tokenizer, 63)
    (batch,) = batches(4)
    writer = Writer(ModelFolder(tmp_path), torch.device("cpu"))
    rows = writer.write(batch, 63, 4, seed=0)
    assert rows.shape == (4, 63) and (rows[:, : len(script.start) - 1] == script.start[1:]).all()
    assert not np.array_equal(rows, writer.write(batch, 63, 4, seed=1))
    known = set(tokenizer.backend.get_vocab().values())
    assert len(known) < 512 and set(rows.ravel().tolist()) <= known
    with pytest.raises(TextError, match=r"expected text.window at least twice .* \(\d+ tokens\), found 10"):
        writing_script(tmp_path, tokenizer, 10)
