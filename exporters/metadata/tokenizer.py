"""Translates a model's tokenizer to GGUF key-values: byte-level BPE ("gpt2") or SentencePiece-style BPE ("llama").

The tables are those of the tokenizer that encodes the text (``evaluators.data.tokenizer``). GGUF has no form for
Unicode normalization (NFC in Qwen's tokenizer): llama.cpp does not normalize text.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from gguf import TokenType

from evaluators.data.tokenizer import SPECIAL_NAMES, ModelTokenizer, TokenizerError, find_tokenizer
from exporters.metadata.architectures import dimensions_of
from exporters.metadata.key_values import KeyValues
from exporters.metadata.pretokenizers import pretokenizer_name
from exporters.metadata.source import ModelSource

log = logging.getLogger(__name__)

SPACE_MARK = "▁"  # what SentencePiece writes for a space
SPECIAL_KEYS = dict(zip(SPECIAL_NAMES, ("bos", "eos", "unknown", "padding"), strict=True))
UNMERGED_SCORE = -1e6  # of pieces that no merge produces: characters, bytes and special tokens


def tokenizer_metadata(source: ModelSource, allow_missing: bool = False) -> KeyValues:
    """Return the key-values ``tokenizer.*`` for the tokenizer in ``source.path``.

    If it has none and ``allow_missing`` is set, the tokenizer model is "none": such a file takes token ids only.
    Raises TokenizerError if there is no tokenizer, if it cannot be read or is not BPE, if two of its tokens have the
    same text or it has more than the embedding has rows, or if llama.cpp does not normalize text as it does or put the
    same tokens around it; UnknownPretokenizerError if llama.cpp cannot split text the same way.
    """
    tokenizer = find_tokenizer(source.path)
    keys = KeyValues()
    if tokenizer is None:
        if not allow_missing:
            raise TokenizerError(f"expected a tokenizer in {source.path}, found none")
        log.warning("%s has no tokenizer: the GGUF file will take token ids only", source.path)
        keys.string("tokenizer.ggml.model", "none")
        return keys
    tables = tokenizer.tables
    model = tables["model"]
    if model.get("type") != "BPE":
        raise TokenizerError(f"expected a BPE tokenizer, found {model.get('type')!r} in {source.path}")
    pieces = _pieces(tables, dimensions_of(source).vocabulary)
    if model.get("byte_fallback"):
        _sentencepiece_keys(tables, pieces, keys)
    else:
        _check_normalizer(tables)
        keys.string("tokenizer.ggml.model", "gpt2")
        keys.string("tokenizer.ggml.pre", pretokenizer_name(tables))
        _add_pieces(pieces, keys)
        keys.array("tokenizer.ggml.merges", [" ".join(pair) for pair in _merges(model)])
    _special_keys(source, tokenizer, keys)
    return keys


def _check_normalizer(tables: Mapping[str, Any]) -> None:
    """Raise TokenizerError for a normalizer of a byte-level BPE other than NFC: GGUF cannot say any."""
    kinds = [step["type"] for step in _normalizers(tables)]
    if kinds not in ([], ["NFC"]):
        raise TokenizerError(
            f"expected no normalizer or NFC in a byte-level BPE tokenizer, found {', '.join(kinds)}: llama.cpp reads "
            "text without it, and would make other tokens"
        )


def _normalizers(tables: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the normalizers in the order in which they are applied."""
    waiting = [tables.get("normalizer")]
    while waiting:
        if step := waiting.pop(0):
            if step["type"] == "Sequence":
                waiting = [*step["normalizers"], *waiting]
            else:
                yield step


def _pieces(tables: Mapping[str, Any], rows: int) -> list[tuple[str, TokenType]]:
    """Return (text, type) for each of the embedding's ``rows`` token ids; ids without a token get an UNUSED filler.

    Fillers have texts of no token: llama.cpp ends the process over two that are equal.
    """
    added = {token["id"]: token for token in tables["added_tokens"]}
    named = {index: text for text, index in tables["model"]["vocab"].items()} | {
        index: token["content"] for index, token in added.items()
    }
    if max(named) >= rows:
        raise TokenizerError(f"expected at most {rows} tokens, the embedding's rows, found token id {max(named)}")
    taken, pieces = set(named.values()), []
    for index in range(rows):
        filler = f"[PAD{index}]"
        while filler in taken:
            filler = f"[{filler}]"  # of no other id: their numbers differ
        pieces.append((filler, TokenType.UNUSED))
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

    Two differences remain to a Metaspace step: before a text that starts with a space, and after a special token,
    llama.cpp adds a space and the step does not.
    """
    pre_tokenizer, steps = tables.get("pre_tokenizer") or {}, list(_normalizers(tables))
    kinds = [step["type"] for step in steps]
    if not kinds and pre_tokenizer.get("type") == "Metaspace":
        return bool(pre_tokenizer.get("prepend_scheme", "always") != "never")
    if pre_tokenizer or kinds not in (["Prepend", "Replace"], ["Replace"]) or steps[-1]["content"] != SPACE_MARK:
        raise TokenizerError(
            f"expected a SentencePiece-style tokenizer that turns spaces into {SPACE_MARK}, found normalizer {kinds} "
            f"and pre-tokenizer {pre_tokenizer.get('type')}"
        )
    return kinds[0] == "Prepend"


def _special_keys(source: ModelSource, tokenizer: ModelTokenizer, keys: KeyValues) -> None:
    """Add special ids (the tokenizer's, else config.json's), whether BOS and EOS are added, and the chat template.

    An id that no token has, such as -1 for none, is left out. Raises TokenizerError for other tokens around a text.
    """
    rows, ids = dimensions_of(source).vocabulary, {}
    for name, key in SPECIAL_KEYS.items():
        index: Any = tokenizer.special.get(name)
        if index is None:
            configured = source.config.get(f"{name}_token_id")
            index = configured[0] if isinstance(configured, list) and configured else configured
        if isinstance(index, int) and 0 <= index < rows:
            ids[name] = index
            keys.uint32(f"tokenizer.ggml.{key}_token_id", index)
    for name, found in (("bos", tokenizer.prefix), ("eos", tokenizer.suffix)):
        if found not in ((), (ids.get(name),)):
            raise TokenizerError(
                f"expected a tokenizer that puts BOS before a text and EOS after it, or nothing, found tokens "
                f"{list(found)} where {name} is {ids.get(name)}: a GGUF file cannot say so"
            )
        keys.boolean(f"tokenizer.ggml.add_{name}_token", bool(found))
    if tokenizer.chat_template:
        keys.string("tokenizer.chat_template", tokenizer.chat_template)
