"""This module opens a model's own tokenizer, for its text and for the exported file.

tokenizer.json is the truth and is read with the tokenizers library: transformers' AutoTokenizer may put the model
type's own pre-tokenizer in the place of the one that the file holds. Only a folder without that file is left to
transformers, and the log says which class built the tokenizer.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from bitgenome.common.errors import UserError
from bitgenome.common.json_files import read_json_object, refuse_lfs_pointer

log = logging.getLogger(__name__)

TOKENIZER, CONFIG, SPECIALS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE, OLD_TEMPLATE = "chat_template.jinja", "chat_template.json"
PIECES, VOCABULARY = "tokenizer.model", "vocab.json"
FILES = (TOKENIZER, PIECES, VOCABULARY)  # a folder without any of them has no tokenizer
SPECIAL_NAMES = ("bos", "eos", "unk", "pad")
PROBE = "a"  # a text whose ids tell what a tokenizer puts around them
FRAMING = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")  # post-processors that add tokens


class TokenizerError(UserError):
    """Raised for a tokenizer that cannot be read, or has no GGUF form; the message is one sentence for the user."""


@dataclass(frozen=True)
class ModelTokenizer:
    """Holds a model's tokenizer as its folder has it.

    ``special`` are the ids of SPECIAL_NAMES that the folder names, ``prefix`` and ``suffix`` the ids that stand around
    every text. ``built_by`` is tokenizer.json or the class of transformers that read other files.
    """

    backend: Tokenizer
    special: Mapping[str, int]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    chat_template: str | None
    built_by: str

    @cached_property
    def tables(self) -> Mapping[str, Any]:
        """The contents of its tokenizer.json."""
        tables: Mapping[str, Any] = json.loads(self.backend.to_str())
        return tables

    @property
    def bos(self) -> int | None:
        """Id of the token that every text begins with, if there is one."""
        return self.prefix[0] if len(self.prefix) == 1 else None

    @property
    def eos(self) -> int | None:
        """Id of the end-of-text token, if there is one."""
        return self.special.get("eos")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without those that stand around it."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def ids(self, text: str) -> list[int]:
        """Return the ids of ``text`` with those that stand around it, as ``Tokenizer.encode`` does by default."""
        return [*self.prefix, *self.encode([text])[0], *self.suffix]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, without special tokens."""
        return str(self.backend.decode(list(ids)))


def find_tokenizer(folder: Path) -> ModelTokenizer | None:
    """Return the tokenizer of a model folder, or None if it has none.

    The last ones opened are kept while their files stay as they are. Raises UserError for one that cannot be read.
    """
    if not any((folder / name).is_file() for name in FILES):
        return None
    files = [folder / name for name in (*FILES, "merges.txt", CONFIG, SPECIALS, TEMPLATE, OLD_TEMPLATE)]
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return _opened(folder, tuple(stamps))


def load_tokenizer(folder: Path) -> ModelTokenizer:
    """Return the tokenizer of a model folder. Raises UserError if there is none, or none that can be read."""
    if (tokenizer := find_tokenizer(folder)) is None:
        raise TokenizerError(f"expected a tokenizer in {folder}, found none")
    return tokenizer


@lru_cache(maxsize=4)
def _opened(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> ModelTokenizer:
    config, specials = _optional(folder / CONFIG), _optional(folder / SPECIALS)
    if (folder / TOKENIZER).is_file():
        refuse_lfs_pointer(folder / TOKENIZER)
        try:
            backend, built_by = Tokenizer.from_file(str(folder / TOKENIZER)), TOKENIZER
        except Exception as error:  # the library raises no narrower class
            raise TokenizerError(f"expected a tokenizer in {folder / TOKENIZER}, found {_line(error)}") from None
        _check_ids(folder / TOKENIZER, backend)
    else:
        backend, built_by = _built_by_transformers(folder)
    backend.no_truncation()
    backend.no_padding()
    special = {}
    for name in SPECIAL_NAMES:
        text = _content(config.get(f"{name}_token")) or _content(specials.get(f"{name}_token"))
        if text and (index := backend.token_to_id(text)) is not None:
            special[name] = index
    prefix, suffix = _frame(backend, folder)
    wanted = [special.get(name) if config.get(f"add_{name}_token") is True else None for name in ("bos", "eos")]
    if wanted != [None, None] and not _says_frame(backend):
        prefix, suffix = (() if index is None else (index,) for index in wanted)
    if not prefix and built_by != TOKENIZER and (folder / PIECES).is_file() and "add_bos_token" not in config:
        prefix = (special["bos"],) if "bos" in special else ()  # SentencePiece's and llama.cpp's default
    if len(prefix) == 1:
        special.setdefault("bos", prefix[0])
    return ModelTokenizer(backend, special, prefix, suffix, _chat_template(folder, config), built_by)


def _check_ids(file: Path, backend: Tokenizer) -> None:
    """Raise TokenizerError unless every token has the id that ``file`` gives it, and no other token has it.

    The library numbers added tokens itself: one whose text is in the vocabulary already, or whose id leaves a gap,
    would silently become another row of the embedding.
    """
    for token in read_json_object(file).get("added_tokens", []):
        if (found := backend.token_to_id(token["content"])) != token["id"]:
            raise TokenizerError(
                f"expected tokens of different texts, and ids without gaps, in {file}, found {token['content']!r} as "
                f"token {token['id']} and as {found}"
            )
    texts: dict[int, str] = {}
    for text, index in backend.get_vocab().items():
        if texts.setdefault(index, text) != text:
            raise TokenizerError(
                f"expected an id for each token in {file}, found {texts[index]!r} and {text!r} as {index}"
            )


def _built_by_transformers(folder: Path) -> tuple[Tokenizer, str]:
    """Return the tokenizer that transformers makes of other files than tokenizer.json, and the name of its class."""
    if not (folder / VOCABULARY).is_file() and find_spec("sentencepiece") is None:
        raise TokenizerError(
            f"expected a tokenizer.json in {folder}, found only {PIECES}, which takes the package sentencepiece to "
            "read: pip install sentencepiece"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, use_fast=True)
    except Exception as error:  # transformers passes on any error of its tokenizers
        raise TokenizerError(f"expected a readable tokenizer in {folder}, found {_line(error)}") from None
    name = type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise TokenizerError(f"expected a {TOKENIZER} in {folder}, found only files that {name} alone can read")
    log.info("%s has no %s: its tokenizer is what transformers' %s makes of its other files", folder, TOKENIZER, name)
    return tokenizer.backend_tokenizer, name


def _frame(backend: Tokenizer, folder: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the post-processor puts before and after a text."""
    bare, framed = (backend.encode(PROBE, add_special_tokens=add).ids for add in (False, True))
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return tuple(framed[:start]), tuple(framed[start + len(bare) :])
    raise TokenizerError(f"expected a tokenizer that puts tokens around a text, found one in {folder} that changes it")


def _says_frame(backend: Tokenizer) -> bool:
    """Return whether tokenizer.json says which tokens stand around a text; else tokenizer_config.json does."""
    found = json.loads(backend.to_str())["post_processor"] or {"processors": []}
    return any(step["type"] in FRAMING for step in found.get("processors", [found]))


def _optional(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, empty if there is no such file."""
    return read_json_object(file) if file.is_file() else {}


def _content(token: Any) -> str | None:
    """Return the text of a special token, which is given as it is or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the default chat template: chat_template.jinja, else of tokenizer_config.json, else chat_template.json."""
    file = folder / TEMPLATE
    try:
        found = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
        found = _optional(folder / OLD_TEMPLATE).get("chat_template") if found is None else found
        if isinstance(found, list):
            found = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        if isinstance(found, dict):
            found = found.get("default")
        if found is not None and not isinstance(found, str):
            raise TokenizerError(f"expected a text as chat template in {folder}, found a {type(found).__name__}")
        (found or "").encode("utf-8")
    except UnicodeError as error:
        raise TokenizerError(f"expected a chat template in UTF-8 in {folder}, found {_line(error)}") from None
    return found or None


def _line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
