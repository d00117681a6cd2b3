"""This module cuts disjoint text into token windows for calibration, search, validation and test."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bitgenome.common.errors import UserError
from evaluators.data.stdlib import SPLITS, read_modules
from evaluators.model.folder import ModelFolder, ModelFolderError


class TextError(UserError):
    """Raised for text that is missing, too short or shared by two splits; the message is one sentence for the user."""


@dataclass(frozen=True)
class TokenWindows:
    """Holds windows (n, T) of int64 token ids by split, and the sha256 of all of them.

    The windows of a split are spread over all of its documents and shuffled, so that any prefix is a fair sample.
    """

    windows: Mapping[str, np.ndarray]
    digest: str

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
        return save(dict(self.windows), metadata={"digest": self.digest})

    @classmethod
    def load(cls, path: Path) -> "TokenWindows":
        """Read a file of ``to_bytes``; the digest is computed anew."""
        windows = load_file(path)
        return cls(windows, windows_digest(windows))


def windows_digest(windows: Mapping[str, np.ndarray]) -> str:
    """Return the sha256 over names, shapes and token ids of all splits, in the order of their names."""
    digest = hashlib.sha256()
    for split in sorted(windows):
        digest.update(f"{split}{windows[split].shape}".encode())
        digest.update(np.ascontiguousarray(windows[split]).tobytes())
    return digest.hexdigest()


def load_tokenizer(folder: ModelFolder) -> PreTrainedTokenizerBase:
    """Load the folder's own tokenizer. Raises ModelFolderError if there is none that can be read."""
    try:
        return AutoTokenizer.from_pretrained(folder.path, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelFolderError(f"expected a tokenizer in {folder.path}, found {reason}") from None


def stdlib_documents(held_out: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the sources of the held-out modules by split, from the running interpreter's standard library."""
    return {split: list(read_modules(held_out[split]).values()) for split in SPLITS}


def file_documents(files: Mapping[str, Path]) -> dict[str, list[str]]:
    """Read one document per split from UTF-8 ``files``.

    Raises TextError for a file that is missing or shared by two splits.
    """
    if len({path.resolve() for path in files.values()}) < len(files):
        raise TextError("expected a file of its own for each split, found the same file twice: splits must be disjoint")
    for split, path in files.items():
        if not path.is_file():
            raise TextError(f"expected a text file for the {split} split, found nothing at {path}")
    return {split: [path.read_text(encoding="utf-8", errors="replace")] for split, path in files.items()}


def divide_file(path: Path, shares: Mapping[str, float]) -> dict[str, list[str]]:
    """Divide the lines of one UTF-8 file into consecutive parts, one document per split.

    ``shares`` are relative numbers of lines; they need not add up to 1. Raises TextError if there is no such file.
    """
    if not path.is_file():
        raise TextError(f"expected a text file, found nothing at {path}")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    bounds = np.cumsum([0.0, *shares.values()]) / sum(shares.values()) * len(lines)
    cuts = bounds.astype(int)
    return {split: ["".join(lines[start:stop])] for split, start, stop in zip(shares, cuts[:-1], cuts[1:], strict=True)}


def token_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Mapping[str, Sequence[str]],
    window: int,
    tokens: Mapping[str, int],
    seed: int,
) -> TokenWindows:
    """Cut each split's ``documents`` into windows of ``window`` tokens and choose ``tokens[split]`` tokens of them.

    The chosen windows (at least one) are evenly spread over the split, then shuffled by ``seed``. Raises TextError if a
    split holds fewer tokens than asked for.
    """
    windows = {}
    for split, wanted in tokens.items():
        ids = _encode(tokenizer, documents[split])
        available, needed = len(ids) // window, max(1, wanted // window)
        if available < needed:
            raise TextError(
                f"expected at least {needed * window} tokens of {split} text, found {len(ids)}: "
                f"lower text.tokens.{split} or give more text"
            )
        chosen = np.linspace(0, available - 1, needed).round().astype(int)
        rows = ids[: available * window].reshape(available, window)[chosen]
        windows[split] = np.random.default_rng([seed, SPLITS.index(split)]).permutation(rows)
    return TokenWindows(windows, windows_digest(windows))


def _encode(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> np.ndarray:
    """Return the token ids of the documents in one row, int64 (n,), with an end-of-text token after each document."""
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(list(documents), add_special_tokens=False)["input_ids"] if documents else []
    return np.array([token for ids in encoded for token in [*ids, *separator]], dtype=np.int64)
