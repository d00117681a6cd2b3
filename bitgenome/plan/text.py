"""Checks the text of a run or study before any work, and reads it into token windows."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import __version__ as tokenizers_version
from transformers import __version__ as transformers_version

from bitgenome.common import layout
from bitgenome.common.digests import digest_of
from bitgenome.common.errors import UserError
from bitgenome.common.files import atomic_write_bytes
from bitgenome.config.run import RunConfig
from bitgenome.config.text import SourceConfig, TextConfig
from bitgenome.storage.run_directory import RunDirectory
from bitgenome.storage.shared import Storage, shared_directory
from evaluators.data.chat import chat_files, divide_chat
from evaluators.data.documents import divide_file, file_documents, stdlib_documents
from evaluators.data.hub import dataset_rows
from evaluators.data.stdlib import SPLITS, load_held_out, stdlib_root
from evaluators.data.texts import Documents, Text, Windows
from evaluators.data.tokenizer import ModelTokenizer, load_tokenizer
from evaluators.data.windows import Part, TokenWindows, saved_windows, token_windows, window_counts
from evaluators.model.folder import ModelFolder
from evaluators.model.outline import text_config
from evaluators.prepare.writing import writing_script

log = logging.getLogger(__name__)

TEXT_SCHEMA = 1  # raise when the same text and settings give other windows
HELD_OUT = "splits.json"  # in the folder of a model that was trained on Python code


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
    """Raise UserError for a window longer than the model's context, or a model that cannot write or read chats.

    Other text is checked when it is read. Warns of Python code for a model that was not trained on it.
    """
    longest = getattr(text_config(folder.path), "max_position_embeddings", None)
    if longest and text.window > longest:
        raise UserError(
            f"expected text.window at most the model's context ({longest}, max_position_embeddings), "
            f"found {text.window}"
        )
    names = {source.source for source in text.sources}
    if "self" in names:
        tokenizer = load_tokenizer(folder.path)
        writing_script(folder.path, tokenizer, row_length(text, tokenizer))
    if "chat" in names and load_tokenizer(folder.path).chat_template is None:
        raise UserError(
            f"expected a model with a chat template for source: chat, found none in {folder.path}: "
            "chat_template.jinja, or chat_template in tokenizer_config.json"
        )
    if "stdlib" in names and not (folder.path / HELD_OUT).is_file():
        log.warning(
            "text.source: stdlib is Python code, on which %s would be calibrated and judged: give text of its use by "
            "file, chat or datasets, or let it write by self", folder.path.name,
        )  # fmt: skip


def row_length(text: TextConfig, tokenizer: ModelTokenizer) -> int:
    """Return the tokens of a window without the BOS token that stands before every text."""
    return text.window - (0 if tokenizer.bos is None else 1)


def written_counts(text: TextConfig) -> dict[str, int]:
    """Return how many windows the model writes itself, by split; splits of which it writes none are left out."""
    found: dict[str, int] = {}
    for split in SPLITS:
        parts = [source for source in text.sources if split in (source.fills or ())]
        counts = window_counts(getattr(text.tokens, split), text.window, [part.share for part in parts])
        own = sum(count for part, count in zip(parts, counts, strict=True) if part.source == "self")
        found |= {split: own} if own else {}
    return found


def ready_windows(plan: ModelAndText) -> TokenWindows | None:
    """Return the token windows as ``read_windows``; None if the model has some of the text still to write.

    All other text is read and checked then too. Raises UserError as ``read_windows``.
    """
    if not written_counts(plan.config.text):
        return read_windows(plan)
    if (kept := kept_windows(plan)) is not None:
        return kept
    length = row_length(plan.config.text, load_tokenizer(plan.folder.path))
    encode_text(plan, {split: np.zeros((n, length), np.int64) for split, n in written_counts(plan.config.text).items()})
    return None


def read_windows(plan: ModelAndText) -> TokenWindows:
    """Return the token windows of all splits: those that ``keep_windows`` has kept for this text, else encoded now.

    Raises UserError for a text that is missing, not UTF-8 or too short, and for one that is not yet written.
    """
    return kept_windows(plan) or encode_text(plan)


def kept_windows(plan: ModelAndText) -> TokenWindows | None:
    """Return the token windows that an earlier run of this text has kept."""
    kept = plan.config.storage_path / layout.SHARED / layout.TEXT_KIND / text_digest(plan)[:16] / layout.WINDOWS
    return saved_windows(kept)


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


def encode_text(plan: ModelAndText, written: Mapping[str, np.ndarray] | None = None) -> TokenWindows:
    """Encode the text of a plan into token windows.

    ``written`` are the windows that the model has written, by split. Raises UserError as ``read_windows``.
    """
    text, tokenizer = plan.config.text, load_tokenizer(plan.folder.path)
    if written is None and written_counts(text):
        raise UserError("expected text that is written already, found text.source: self: bitgenome run writes it first")
    tokens = {split: getattr(text.tokens, split) for split in SPLITS}
    return token_windows(tokenizer, texts_of(text, tokenizer, written or {}), text.window, tokens, text.seed)


def texts_of(
    text: TextConfig, tokenizer: ModelTokenizer, written: Mapping[str, np.ndarray] | None = None
) -> dict[str, list[Part]]:
    """Return the parts of the text of all splits, in the order of the sources.

    Raises UserError for a file that is missing, not UTF-8, or shared by two sources.
    """
    read: dict[Path, str] = {}
    for name, path in text_files(text):
        if not path.is_file():
            raise UserError(f"expected a file for {name}, found nothing at {path}")
        if (other := read.setdefault(path.resolve(), name)) != name:
            raise UserError(f"expected a file of its own for each source, found {path} for {other} and {name}")
    found: dict[str, list[Part]] = {split: [] for split in SPLITS}
    for source in text.sources:
        for split, part in source_texts(source, text.shares, tokenizer, written or {}).items():
            found[split].append(Part(part, source.share))
    return found


def source_texts(
    source: SourceConfig, shares: Mapping[str, float], tokenizer: ModelTokenizer, written: Mapping[str, np.ndarray]
) -> Mapping[str, Text]:
    """Return the text of one source by split. Raises UserError for a text that is missing, or has another form."""
    fills = source.fills or ()
    own: dict[str, float] = {split: shares[split] for split in fills}
    if source.source == "self":
        return {split: Windows(rows) for split, rows in written.items() if split in fills}
    if source.source == "datasets" and (data := source.dataset):
        return dataset_rows(data.id, data.subset, data.split, data.revision, data.column, own, tokenizer)
    if source.source == "chat":
        return divide_chat(source.path, own, tokenizer) if source.path else chat_files(source.files or {}, tokenizer)
    if source.source == "stdlib":
        documents = stdlib_documents(load_held_out(source.splits))
    elif source.source == "file" and source.path:
        documents = divide_file(source.path, own)
    else:
        documents = file_documents(source.files or {})
    return {split: Documents(documents[split]) for split in fills}


def text_files(text: TextConfig) -> Iterator[tuple[str, Path]]:
    """Yield the files that the text is read from, with the key that names each."""
    for index, source in enumerate(text.sources):
        key = "text" if isinstance(text.source, str) else f"text.source[{index}]"
        if source.source == "stdlib":
            yield f"{key}.splits", source.splits
        elif source.source in ("file", "chat") and source.path:
            yield f"{key}.path", source.path
        elif source.source in ("files", "chat"):
            yield from ((f"{key}.files.{split}", path) for split, path in (source.files or {}).items())


def text_digest(plan: ModelAndText) -> str:
    """Return a digest of what decides the token windows: settings, tokenizer, and size and time of the text's files.

    Of text that the model writes, the model too.
    """
    text = plan.config.text
    files = [path for _, path in text_files(text)]
    if any(source.source == "stdlib" for source in text.sources):
        files.append(stdlib_root() / "os.py")  # stands for the installation
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    tokenizer = load_tokenizer(plan.folder.path)
    special = sorted(tokenizer.special.items()), tokenizer.prefix, tokenizer.chat_template
    versions = tokenizers_version, transformers_version
    writes = [plan.folder.digest] if written_counts(text) else []
    settings = text.model_dump(mode="json")
    return digest_of(TEXT_SCHEMA, settings, stamps, versions, special, tokenizer.backend.to_str(), *writes)
