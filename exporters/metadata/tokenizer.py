"""Translates a model's tokenizer to GGUF key-values: byte-level BPE ("gpt2") or SentencePiece-style BPE ("llama").

The tables come from the tokenizer that transformers builds from the model directory, the same one that tokenizes the
text. GGUF has no form for Unicode normalization (NFC in Qwen's tokenizer): llama.cpp does not normalize text.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import TokenType
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bitgenome.common.errors import UserError
from exporters.metadata.architectures import dimensions_of
from exporters.metadata.key_values import KeyValues
from exporters.metadata.pretokenizers import pretokenizer_name
from exporters.metadata.source import ModelSource

log = logging.getLogger(__name__)

SPACE_MARK = "▁"  # what SentencePiece writes for a space
SPECIAL_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
UNMERGED_SCORE = -1e6  # of pieces that no merge produces: characters, bytes and special tokens


class TokenizerError(UserError):
    """Raised if a tokenizer has no GGUF form; the message is one sentence for the user."""


def tokenizer_metadata(source: ModelSource, allow_missing: bool = False) -> KeyValues:
    """Return the key-values ``tokenizer.*`` for the tokenizer in ``source.path``.

    If it has none and ``allow_missing`` is set, the tokenizer model is "none": such a file takes token ids only.
    Raises TokenizerError if there is no tokenizer, if it cannot be read or is not BPE, if it has more tokens than the
    embedding has rows, or if llama.cpp does not normalize text as it does; UnknownPretokenizerError if llama.cpp
    cannot split text the same way.
    """
    tokenizer = _load(source.path)
    keys = KeyValues()
    if tokenizer is None:
        if not allow_missing:
            raise TokenizerError(f"expected a tokenizer in {source.path}, found none")
        log.warning("%s has no tokenizer: the GGUF file will take token ids only", source.path)
        keys.string("tokenizer.ggml.model", "none")
        return keys
    tables = json.loads(tokenizer.backend_tokenizer.to_str())
    model = tables["model"]
    if model.get("type") != "BPE":
        raise TokenizerError(f"expected a BPE tokenizer, found {model.get('type')!r} in {source.path}")
    pieces = _pieces(tables, dimensions_of(source).vocabulary)
    if model.get("byte_fallback"):
        _sentencepiece_keys(tables, pieces, keys)
    else:
        keys.string("tokenizer.ggml.model", "gpt2")
        keys.string("tokenizer.ggml.pre", pretokenizer_name(tables))
        _add_pieces(pieces, keys)
        keys.array("tokenizer.ggml.merges", [" ".join(pair) for pair in _merges(model)])
    _special_keys(source, tokenizer, keys)
    return keys


def _load(path: Path) -> PreTrainedTokenizerBase | None:
    files = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((path / name).is_file() for name in files):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, use_fast=True)
    except Exception as error:  # transformers passes on any error of its tokenizers
        raise TokenizerError(f"expected a readable tokenizer in {path}, found {str(error).splitlines()[0]}") from error
    if not tokenizer.is_fast:
        raise TokenizerError(f"expected a tokenizer.json in {path}, found only {type(tokenizer).__name__}'s own files")
    return tokenizer


def _pieces(tables: Mapping[str, Any], rows: int) -> list[tuple[str, TokenType]]:
    """Return (text, type) for each of the embedding's ``rows`` token ids; ids without a token get an UNUSED filler."""
    pieces = [(f"[PAD{i}]", TokenType.UNUSED) for i in range(rows)]
    added = {token["id"]: token for token in tables["added_tokens"]}
    named = {index: text for text, index in tables["model"]["vocab"].items()} | {
        index: token["content"] for index, token in added.items()
    }
    if max(named) >= rows:
        raise TokenizerError(f"expected at most {rows} tokens, the embedding's rows, found token id {max(named)}")
    unknown = tables["model"].get("unk_token")
    for index, text in named.items():
        kind = TokenType.NORMAL
        if text == unknown:
            kind = TokenType.UNKNOWN
        elif index in added:
            kind = TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
        pieces[index] = (text, kind)
    return pieces


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the merges as pairs, best first; tokenizer.json has them as lists or, before 2024, as "left right"."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _add_pieces(pieces: list[tuple[str, TokenType]], keys: KeyValues) -> None:
    keys.array("tokenizer.ggml.tokens", [text for text, _ in pieces])
    keys.array("tokenizer.ggml.token_type", [int(kind) for _, kind in pieces])


def _sentencepiece_keys(tables: Mapping[str, Any], pieces: list[tuple[str, TokenType]], keys: KeyValues) -> None:
    """Add the keys of a SentencePiece-style tokenizer.

    llama.cpp merges the pair whose result has the highest score, so a piece's score is minus the rank of its first
    merge: that gives the order of the merges.
    """
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(tables["model"])):
        ranks.setdefault(left + right, rank)
    typed = []
    for text, kind in pieces:
        is_byte = kind is TokenType.NORMAL and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        typed.append((text, TokenType.BYTE if is_byte else kind))
    keys.string("tokenizer.ggml.model", "llama")
    _add_pieces(typed, keys)
    keys.array("tokenizer.ggml.scores", [float(-ranks[t]) if t in ranks else UNMERGED_SCORE for t, _ in typed])
    keys.boolean("tokenizer.ggml.add_space_prefix", _space_prefix(tables))
    keys.boolean("tokenizer.ggml.remove_extra_whitespaces", False)


def _space_prefix(tables: Mapping[str, Any]) -> bool:
    """Return whether a space is put before the text; raise TokenizerError for a normalization llama.cpp does not do.

    One difference remains: for a text that starts with a space, llama.cpp adds another, a Metaspace step does not.
    """
    normalizer, pre_tokenizer = tables.get("normalizer") or {}, tables.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    kinds = [step["type"] for step in steps]
    if not kinds and pre_tokenizer.get("type") == "Metaspace":
        return bool(pre_tokenizer.get("prepend_scheme", "always") != "never")
    if pre_tokenizer or kinds not in (["Prepend", "Replace"], ["Replace"]) or steps[-1]["content"] != SPACE_MARK:
        raise TokenizerError(
            f"expected a SentencePiece-style tokenizer that turns spaces into {SPACE_MARK}, found normalizer {kinds} "
            f"and pre-tokenizer {pre_tokenizer.get('type')}"
        )
    return kinds[0] == "Prepend"


def _special_keys(source: ModelSource, tokenizer: PreTrainedTokenizerBase, keys: KeyValues) -> None:
    """Add special ids (the tokenizer's, else config.json's), whether BOS and EOS are added, and the chat template."""
    ids = {}
    for name, key in SPECIAL_KEYS.items():
        index = getattr(tokenizer, f"{name}_token_id", None)
        if index is None:
            configured = source.config.get(f"{name}_token_id")
            index = configured[0] if isinstance(configured, list) else configured
        if index is not None:
            ids[name] = index
            keys.uint32(f"tokenizer.ggml.{key}_token_id", index)
    bare, framed = (tokenizer("a", add_special_tokens=add).input_ids for add in (False, True))
    keys.boolean("tokenizer.ggml.add_bos_token", len(framed) > len(bare) and framed[0] == ids.get("bos"))
    keys.boolean("tokenizer.ggml.add_eos_token", len(framed) > len(bare) and framed[-1] == ids.get("eos"))
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        keys.string("tokenizer.chat_template", template)
