"""This module cuts windows of token ids out of one text: documents, rows of a file or data set, or text of a model.

A window is a row of ids without the BOS token, which ``evaluators.data.windows`` puts before it.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from evaluators.data.documents import Document, TextError
from evaluators.data.tokenizer import ModelTokenizer

WHOLE_TEXT = 1 << 20  # characters of a split up to which all of it is encoded
CHARACTERS = 6  # of a slice for each token that is wanted of it, at first
SAMPLE_PIECES, SAMPLE_CHARACTERS = 4, 1024  # of the test text, as it is before a tokenizer reads it
CUT_TOKENS = 8  # at the end of a slice, which may be parts of a word that goes on
SPARE = 4  # times as many slices, or rows, where some hold too few tokens
NEXT_LINE = 4096  # characters within which a slice looks for the start of a line


class Text(Protocol):
    """Text of one split, from one source."""

    def cut(self, tokenizer: ModelTokenizer, needed: int, length: int, split: str) -> np.ndarray:
        """Return ``needed`` windows int64 (needed, length), evenly spread over the text.

        Raises TextError, which names ``split``, if there are fewer.
        """

    def sample(self, tokenizer: ModelTokenizer) -> str:
        """Return some pieces of the text as a user would write it, without special tokens."""


@dataclass(frozen=True)
class Documents:
    """Text of whole documents, one after the other with the end-of-text token between them.

    If they have more than WHOLE_TEXT characters, not all of it is encoded, but one evenly spread slice for each window,
    if slices hold a window each.
    """

    documents: Sequence[Document]

    def cut(self, tokenizer: ModelTokenizer, needed: int, length: int, split: str) -> np.ndarray:
        total = sum(map(len, self.documents))
        large = total > max(WHOLE_TEXT, needed * length)  # a shorter one may just suffice
        rows = _sliced(tokenizer, self.documents, needed, length) if large else None
        return _spread(list(_encoded(tokenizer, self.documents)), needed, length, split) if rows is None else rows

    def sample(self, tokenizer: ModelTokenizer) -> str:
        return _sample(self.documents)


@dataclass(frozen=True)
class Rows:
    """Text of ``count`` rows, each read when it is taken: of conversations, or of a data set.

    As many evenly spread rows are read as the windows need. ``special`` says that rows hold the special tokens that
    separate them; else the end-of-text token stands after each.
    """

    count: int
    row: Callable[[int], str]
    plain: Callable[[int], str]  # the row without special tokens
    special: bool = False

    def cut(self, tokenizer: ModelTokenizer, needed: int, length: int, split: str) -> np.ndarray:
        wanted = needed * length
        taken = min(self.count, 1 + wanted // length)
        while True:
            rows = (self.row(int(index)) for index in self.spread(taken))
            ids = list(_encoded(tokenizer, rows, separated=not self.special))
            if taken == self.count or sum(map(len, ids)) >= wanted:
                return _spread(ids, needed, length, split)
            taken = min(self.count, SPARE * taken)

    def spread(self, taken: int) -> np.ndarray:
        """Return the indices of ``taken`` rows, evenly spread."""
        return np.linspace(0, self.count - 1, taken).round().astype(int)

    def sample(self, tokenizer: ModelTokenizer) -> str:
        pieces = [self.plain(int(index))[:SAMPLE_CHARACTERS] for index in self.spread(min(self.count, SAMPLE_PIECES))]
        return "".join(f"{piece}\n\n" for piece in pieces)


@dataclass(frozen=True)
class Windows:
    """Text that is there as windows int64 (n, length) already: what the model has written."""

    rows: np.ndarray

    def cut(self, tokenizer: ModelTokenizer, needed: int, length: int, split: str) -> np.ndarray:
        if self.rows.shape[1] != length or len(self.rows) < needed:
            raise TextError(
                f"expected {needed} written windows of {length} tokens for {split}, found {self.rows.shape}"
            )
        return self.rows[:needed]

    def sample(self, tokenizer: ModelTokenizer) -> str:
        return "".join(f"{tokenizer.decode(row)[:SAMPLE_CHARACTERS]}\n\n" for row in self.rows[:SAMPLE_PIECES])


def _spread(encoded: Sequence[np.ndarray], needed: int, length: int, split: str) -> np.ndarray:
    """Return ``needed`` windows (needed, length), evenly spread over the ids of all documents."""
    ids = np.concatenate([np.zeros(0, dtype=np.int64), *encoded])
    available = len(ids) // length
    if available < needed:
        raise TextError(
            f"expected at least {needed * length} tokens of {split} text, found {len(ids)}: "
            f"lower text.tokens.{split} or give more text"
        )
    chosen = np.linspace(0, available - 1, needed).round().astype(int)
    return ids[: available * length].reshape(available, length)[chosen]


def _encoded(tokenizer: ModelTokenizer, documents: Iterable[Document], separated: bool = True) -> Iterator[np.ndarray]:
    """Yield the ids of the documents, int64, in order and, if ``separated``, with an end-of-text token after each.

    A document is encoded in pieces of WHOLE_TEXT characters, because an encoding takes a hundred times the memory of
    its text; a word at such a cut becomes two.
    """
    separator = [tokenizer.eos] if separated and tokenizer.eos is not None else []
    for document in documents:
        found = array("q")
        for start in range(0, len(document), WHOLE_TEXT):
            found.extend(tokenizer.encode([document[start : start + WHOLE_TEXT]])[0])
        found.extend(separator)
        yield np.frombuffer(found, dtype=np.int64)


def _sliced(tokenizer: ModelTokenizer, documents: Sequence[Document], needed: int, length: int) -> np.ndarray | None:
    """Return a window (needed, length) from the start of each of ``needed`` equal spans of the documents.

    A span's text is encoded only as far as its window needs. Where spans hold too few tokens, such as blank ones, the
    windows are those of SPARE times as many spans; None if that does not give enough.
    """
    total = sum(map(len, documents))
    for count in (needed, SPARE * needed):
        spans = ((index * total // count, (index + 1) * total // count) for index in range(count))
        found = [ids for start, stop in spans if (ids := _slice(tokenizer, documents, start, stop, length))]
        if len(found) >= needed:
            return np.array(found, dtype=np.int64)[np.linspace(0, len(found) - 1, needed).round().astype(int)]
    return None


def _slice(
    tokenizer: ModelTokenizer, documents: Sequence[Document], start: int, stop: int, length: int
) -> list[int] | None:
    """Return the first ``length`` ids of the text from ``start`` to ``stop`` over all documents, None if it has fewer.

    They begin with a line, or with a word in a text without lines.
    """
    separator = [] if tokenizer.eos is None else [tokenizer.eos]
    size = CHARACTERS * length
    while True:
        size = min(size, stop - start)
        first, *others = _pieces(documents, start, start + size)
        ids, *later = tokenizer.encode([_from_line(first) if start else first, *others])
        for other in later:
            ids += separator + other
        if len(ids) >= length + CUT_TOKENS:
            return ids[:length]
        if size == stop - start:
            return None
        size *= 2


def _pieces(documents: Sequence[Document], start: int, stop: int) -> list[str]:
    """Return what the documents hold from ``start`` to ``stop``, counted over all of them: a piece of each one met."""
    pieces, before = [], 0
    for document in documents:
        here = slice(max(0, start - before), min(len(document), stop - before))
        if here.start < here.stop:
            pieces.append(document[here])
        before += len(document)
    return pieces


def _from_line(text: str) -> str:
    """Return ``text`` from its first start of a line, else of a word, within NEXT_LINE characters."""
    head = text[: min(NEXT_LINE, len(text) // 4)]
    return text[head.find("\n") + 1 or head.find(" ") + 1 :]


def _sample(documents: Sequence[Document]) -> str:
    """Return some pieces of the documents, evenly spread, with a blank line after each."""
    total = sum(map(len, documents))
    starts = range(0, total, max(SAMPLE_CHARACTERS, -(-total // SAMPLE_PIECES)))
    pieces = ["".join(_pieces(documents, start, min(start + SAMPLE_CHARACTERS, total))) for start in starts]
    return "".join(f"{piece}\n\n" for piece in pieces)
