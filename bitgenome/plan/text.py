"""Checks the text of a run or study before any work, and reads it into token windows."""

from pathlib import Path
from typing import Protocol

from bitgenome.common.errors import UserError
from bitgenome.config.text import TextConfig
from bitgenome.storage.shared import Storage
from evaluators.data.stdlib import SPLITS, load_held_out
from evaluators.data.windows import (
    TokenWindows,
    divide_file,
    file_documents,
    load_tokenizer,
    stdlib_documents,
    token_windows,
)
from evaluators.model.folder import ModelFolder


class StorageAndText(Storage, Protocol):
    """Settings that text and calibration depend on."""

    @property
    def text(self) -> TextConfig: ...


class ModelAndText(Protocol):
    """The part of a run's or a study's plan that text and calibration depend on."""

    @property
    def config(self) -> StorageAndText: ...

    @property
    def folder(self) -> ModelFolder: ...


def check_text(text: TextConfig, folder: ModelFolder) -> None:
    """Raise UserError for a missing text file, or a window longer than the model's context."""
    longest = folder.config.get("max_position_embeddings")
    if longest and text.window > longest:
        raise UserError(
            f"expected text.window at most the model's context ({longest}, max_position_embeddings), "
            f"found {text.window}"
        )
    needed: dict[str, Path | None] = {"text.splits": text.splits if text.source == "stdlib" else None}
    if text.source == "file":
        needed["text.path"] = text.path
    for name, path in {**needed, **(text.files or {})}.items():
        if path is not None and not path.is_file():
            raise UserError(f"expected a file for {name}, found nothing at {path}")


def read_windows(plan: ModelAndText) -> TokenWindows:
    """Return the token windows of all splits. Raises TextError if a split is too short."""
    text = plan.config.text
    if text.source == "stdlib":
        documents = stdlib_documents(load_held_out(text.splits))
    elif text.source == "file" and text.path:
        documents = divide_file(text.path, text.shares)
    else:
        documents = file_documents(text.files or {})
    tokens = {split: getattr(text.tokens, split) for split in SPLITS}
    return token_windows(load_tokenizer(plan.folder), documents, text.window, tokens, text.seed)
