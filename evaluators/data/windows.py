"""This module cuts disjoint text into token windows for calibration, search, validation and test."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from evaluators.data.documents import Document
from evaluators.data.stdlib import SPLITS
from evaluators.data.texts import Documents, Text
from evaluators.data.tokenizer import ModelTokenizer

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


@dataclass(frozen=True)
class Part:
    """A text, and the share of a split's windows that come from it, relative to that of the other parts."""

    text: Text
    share: float = 1.0


def token_windows(
    tokenizer: ModelTokenizer,
    texts: Mapping[str, Sequence[Document] | Sequence[Part]],
    window: int,
    tokens: Mapping[str, int],
    seed: int,
) -> TokenWindows:
    """Cut each split's text into windows of ``window`` tokens and choose ``tokens[split]`` tokens of them.

    ``texts`` holds documents, or the parts of a mix. The chosen windows (at least one) are evenly spread over each
    text, then shuffled by ``seed``. Each begins with the BOS token where the tokenizer puts it before a text. Raises
    TextError if a text holds fewer tokens than asked for.
    """
    first = [] if tokenizer.bos is None else [tokenizer.bos]
    length = window - len(first)
    windows, sample = {}, ""
    for split, wanted in tokens.items():
        parts = parts_of(texts[split])
        counts = window_counts(wanted, window, [part.share for part in parts])
        cut = [
            part.text.cut(tokenizer, count, length, split) for part, count in zip(parts, counts, strict=True) if count
        ]
        rows = np.hstack([np.full((sum(counts), len(first)), first, dtype=np.int64), np.concatenate(cut)])
        windows[split] = np.random.default_rng([seed, SPLITS.index(split)]).permutation(rows)
        if split == "test":
            sample = "".join(part.text.sample(tokenizer) for part, count in zip(parts, counts, strict=True) if count)
    return TokenWindows(windows, windows_digest(windows, len(first)), len(first), sample)


def parts_of(text: Sequence[Document] | Sequence[Part]) -> list[Part]:
    """Return the parts of a mix; documents are its only part."""
    parts = [part for part in text if isinstance(part, Part)]
    return parts or [Part(Documents([document for document in text if not isinstance(document, Part)]))]


def window_counts(tokens: int, window: int, shares: Sequence[float]) -> list[int]:
    """Return how many windows each part of a mix gives to a split of ``tokens`` tokens; together at least one."""
    return divided(max(1, tokens // window), shares)


def divided(count: int, shares: Sequence[float]) -> list[int]:
    """Return ``count`` divided by ``shares`` into whole numbers, which add up to it.

    Each is the number below its exact share; the largest remainders, the first of equal ones, get the rest.
    """
    exact = [count * share / sum(shares) for share in shares]
    whole = [int(number) for number in exact]
    order = sorted(range(len(shares)), key=lambda part: whole[part] - exact[part])
    for part in order[: count - sum(whole)]:
        whole[part] += 1
    return whole
