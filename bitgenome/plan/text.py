"""Checks the text of a run or study before any work, and reads it into token windows."""

import logging
from pathlib import Path
from typing import Protocol

from tokenizers import __version__ as tokenizers_version
from transformers import __version__ as transformers_version

from bitgenome.common import layout
from bitgenome.common.digests import digest_of
from bitgenome.common.errors import UserError
from bitgenome.common.files import atomic_write_bytes
from bitgenome.config.run import RunConfig
from bitgenome.config.text import TextConfig
from bitgenome.storage.run_directory import RunDirectory
from bitgenome.storage.shared import Storage, shared_directory
from evaluators.data.documents import Document, divide_file, file_documents, stdlib_documents
from evaluators.data.stdlib import SPLITS, load_held_out, stdlib_root
from evaluators.data.tokenizer import load_tokenizer
from evaluators.data.windows import TokenWindows, saved_windows, token_windows
from evaluators.model.folder import ModelFolder

log = logging.getLogger(__name__)

TEXT_SCHEMA = 1  # raise when the same text and settings give other windows


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
    """Raise UserError for a window longer than the model's context. The text itself is checked when it is read."""
    longest = folder.config.get("max_position_embeddings")
    if longest and text.window > longest:
        raise UserError(
            f"expected text.window at most the model's context ({longest}, max_position_embeddings), "
            f"found {text.window}"
        )


def read_windows(plan: ModelAndText) -> TokenWindows:
    """Return the token windows of all splits: those that ``keep_windows`` has kept for this text, else encoded now.

    Raises UserError for a text that is missing, not UTF-8 or too short.
    """
    kept = plan.config.storage_path / layout.SHARED / layout.TEXT_KIND / text_digest(plan)[:16] / layout.WINDOWS
    return saved_windows(kept) or encode_text(plan)


def keep_windows(plan: ModelAndText, windows: TokenWindows) -> None:
    """Keep the windows of a plan's text under the storage path, for other runs of it."""
    file = shared_directory(plan.config, layout.TEXT_KIND, text_digest(plan)) / layout.WINDOWS
    if not file.is_file():
        atomic_write_bytes(file, windows.to_bytes())


def windows_of_run(config: RunConfig) -> TokenWindows | None:
    """Return the token windows that the run of ``config`` was begun with, None if it begins now or they are damaged.

    Raises UserError if the run's directory belongs to another configuration.
    """
    if (run := RunDirectory.find(config)) is None:
        return None
    windows = saved_windows(run.path / layout.WINDOWS)
    if windows and windows.digest == run.record.get("digests", {}).get("text"):
        return windows
    log.warning("%s is missing or damaged: reading the text again", run.path / layout.WINDOWS)
    return None


def encode_text(plan: ModelAndText) -> TokenWindows:
    """Encode the text of a plan into token windows. Raises UserError as ``read_windows``."""
    text = plan.config.text
    tokens = {split: getattr(text.tokens, split) for split in SPLITS}
    return token_windows(load_tokenizer(plan.folder.path), documents_of(text), text.window, tokens, text.seed)


def documents_of(text: TextConfig) -> dict[str, list[Document]]:
    """Return the documents of all splits. Raises UserError for a file that is missing or not UTF-8."""
    for name, path in text_files(text).items():
        if not path.is_file():
            raise UserError(f"expected a file for {name}, found nothing at {path}")
    if text.source == "stdlib":
        return stdlib_documents(load_held_out(text.splits))
    if text.source == "file" and text.path:
        return divide_file(text.path, text.shares)
    return file_documents(text.files or {})


def text_files(text: TextConfig) -> dict[str, Path]:
    """Return the files that the text is read from, by the key that names them."""
    if text.source == "stdlib":
        return {"text.splits": text.splits}
    if text.source == "file" and text.path:
        return {"text.path": text.path}
    return {f"text.files.{split}": path for split, path in (text.files or {}).items()}


def text_digest(plan: ModelAndText) -> str:
    """Return a digest of what decides the token windows: settings, tokenizer, and size and time of the text's files."""
    files = [*text_files(plan.config.text).values()]
    if plan.config.text.source == "stdlib":
        files.append(stdlib_root() / "os.py")  # stands for the installation
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    tokenizer = load_tokenizer(plan.folder.path)
    special = sorted(tokenizer.special.items()), tokenizer.prefix
    versions = tokenizers_version, transformers_version
    settings = plan.config.text.model_dump(mode="json")
    return digest_of(TEXT_SCHEMA, settings, stamps, versions, special, tokenizer.backend.to_str())
