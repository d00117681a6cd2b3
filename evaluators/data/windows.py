"""This module cuts disjoint text into token windows for calibration, search, validation and test."""

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from evaluators.data.documents import Document, TextError
from evaluators.data.stdlib import SPLITS
from evaluators.data.tokenizer import ModelTokenizer

WHOLE_TEXT = 1 << 20  # characters of a split up to which all of it is encoded
CHARACTERS = 6  # of a slice for each token that is wanted of it, at first
SAMPLE_PIECES, SAMPLE_CHARACTERS = 4, 1024  # of the test text, as it is before a tokenizer reads it
CUT_TOKENS = 8  # at the end of a slice, which may be parts of a word that goes on
SPARE = 4  # times as many slices where some hold too few tokens
NEXT_LINE = 4096  # characters within which a slice looks for the start of a line

Values = TypeVar("Values", bound=Any)  # an array or tensor (n, T, ...)


@dataclass(frozen=True)
class TokenWindows:
    """Holds windows (n, T) of int64 token ids by split, and the sha256 of all of them.

    The windows of a split are spread over all of its documents and shuffled, so that any prefix is a fair sample.
    ``unscored`` is 1 where every window begins with the BOS token, as llama.cpp runs the file, else 0: see ``scored``.
    ``sample`` is some of the test text, before any tokenizer.
    """

    windows: Mapping[str, np.ndarray]
    digest: str
    unscored: int = 0
    sample: str = ""

    @property
    def window(self) -> int:
        """Length T of a window, in tokens."""
        return int(next(iter(self.windows.values())).shape[1])

    def take(self, split: str, tokens: int, draw: int = 0) -> np.ndarray:
        """Return the first windows (n, T) of ``split`` that hold at most ``tokens`` tokens, but at least one window.

        ``draw`` is the seed of a random order of the windows; 0 keeps the stored order.
        """
        rows = self.windows[split]
        count = max(1, tokens // rows.shape[1])
        return rows[:count] if draw == 0 else rows[np.random.default_rng(draw).permutation(len(rows))[:count]]

    def to_bytes(self) -> bytes:
        """Return the windows as a safetensors file."""
        digest = windows_digest(self.windows, self.unscored)
        described = {"digest": digest, "unscored": str(self.unscored), "sample": self.sample}
        return save(dict(self.windows), metadata=described)

    @classmethod
    def load(cls, path: Path) -> "TokenWindows":
        """Read a file of ``to_bytes``. Raises SafetensorError, OSError or ValueError for a file that is damaged."""
        with safe_open(path, framework="np") as file:
            described = file.metadata() or {}
            windows = {split: file.get_tensor(split) for split in file.keys()}  # noqa: SIM118 - no mapping
        unscored = int(described.get("unscored", 0))  # files of before have neither this nor a sample
        digest = windows_digest(windows, unscored)
        if described.get("digest") != digest:
            raise ValueError(f"expected token windows of digest {described.get('digest')} in {path}, found {digest}")
        return cls(windows, digest, unscored, described.get("sample", ""))


def scored(values: Values, unscored: int) -> Values:
    """Return the positions of ``values`` (n, T, ...) whose predictions count: all but the first ``unscored``.

    What a model says after BOS alone is no property of the text, so it is left out of KL, perplexity and every loss.
    The Hessians see the position: later ones attend to it.
    """
    return values[:, unscored:]


def windows_digest(windows: Mapping[str, np.ndarray], unscored: int = 0) -> str:
    """Return the sha256 over names, shapes and token ids of all splits, in the order of their names."""
    digest = hashlib.sha256()
    for split in sorted(windows):
        digest.update(f"{split}{windows[split].shape}".encode())
        digest.update(np.ascontiguousarray(windows[split]).tobytes())
    if unscored:
        digest.update(f"unscored{unscored}".encode())
    return digest.hexdigest()


def saved_windows(path: Path) -> TokenWindows | None:
    """Return the windows in a file of ``to_bytes``, or None where it is missing or damaged."""
    try:
        return TokenWindows.load(path)
    except (SafetensorError, OSError, ValueError):
        return None


def token_windows(
    tokenizer: ModelTokenizer,
    documents: Mapping[str, Sequence[Document]],
    window: int,
    tokens: Mapping[str, int],
    seed: int,
) -> TokenWindows:
    """Cut each split's ``documents`` into windows of ``window`` tokens and choose ``tokens[split]`` tokens of them.

    The chosen windows (at least one) are evenly spread over the split, then shuffled by ``seed``. Each begins with the
    BOS token where the tokenizer puts it before a text. A split of more than WHOLE_TEXT characters is not encoded as a
    whole, but one evenly spread slice for each window, if slices hold a window each. Raises TextError if a split holds
    fewer tokens than asked for.
    """
    first = [] if tokenizer.bos is None else [tokenizer.bos]
    length = window - len(first)
    windows = {}
    for split, wanted in tokens.items():
        needed = max(1, wanted // window)
        total = sum(map(len, documents[split]))
        large = total > max(WHOLE_TEXT, needed * length)  # a shorter one may just suffice
        rows = _sliced(tokenizer, documents[split], needed, length) if large else None
        if rows is None:
            rows = _spread(tokenizer, documents[split], needed, length, split)
        rows = np.hstack([np.full((needed, len(first)), first, dtype=np.int64), rows])
        windows[split] = np.random.default_rng([seed, SPLITS.index(split)]).permutation(rows)
    digest = windows_digest(windows, len(first))
    return TokenWindows(windows, digest, len(first), _sample(documents.get("test", ())))


def _spread(
    tokenizer: ModelTokenizer, documents: Sequence[Document], needed: int, length: int, split: str
) -> np.ndarray:
    """Encode all ``documents`` and return ``needed`` windows (needed, length), evenly spread over them."""
    ids = np.concatenate([np.zeros(0, dtype=np.int64), *_encoded(tokenizer, documents)])
    available = len(ids) // length
    if available < needed:
        raise TextError(
            f"expected at least {needed * length} tokens of {split} text, found {len(ids)}: "
            f"lower text.tokens.{split} or give more text"
        )
    chosen = np.linspace(0, available - 1, needed).round().astype(int)
    return ids[: available * length].reshape(available, length)[chosen]


def _encoded(tokenizer: ModelTokenizer, documents: Sequence[Document]) -> Iterator[np.ndarray]:
    """Yield the ids of the documents, int64, in order and with an end-of-text token after each.

    A document is encoded in pieces of WHOLE_TEXT characters, because an encoding takes a hundred times the memory of
    its text; a word at such a cut becomes two.
    """
    separator = [] if tokenizer.eos is None else [tokenizer.eos]
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
