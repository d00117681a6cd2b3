"""Makes the tokenizer's files of a Hugging Face folder of a GGUF file's key-values.

tokenizer.json splits and merges as llama.cpp does for ``tokenizer.ggml.model`` gpt2 (byte-level BPE) and llama (pieces
merged by score, as SentencePiece's BPE). transformers' own conversion of these takes the GPT-2 splitting for names that
it does not know, such as smollm, and would silently make other tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import TokenType
from transformers.tokenization_utils_base import generate_merges

from exporters.metadata.pretokenizers import ADDS_BOS, UnknownPretokenizerError, canonical_name, pre_tokenizer_of
from exporters.metadata.tokenizer import SPACE_MARK
from exporters.opening.source import GgufModel, GgufModelError

BYTE_LEVEL, SENTENCEPIECE, MERGED_PIECES = "gpt2", "llama", "gemma4"
LINES = r"[^\n]+|[\n]+"  # within which llama.cpp merges a gemma4 text
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # ours -> llama.cpp's
DEFAULT_IDS = {SENTENCEPIECE: {"bos": 1, "eos": 2, "unk": 0}}  # of llama.cpp, where a file names none
WHOLE = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)  # found in text before it is split
PREFIX = "tokenizer.ggml."


@dataclass(frozen=True)
class TokenizerFiles:
    """Holds the contents of tokenizer.json, tokenizer_config.json and chat_template.jinja."""

    tables: Mapping[str, Any]
    config: Mapping[str, Any]
    chat_template: str | None


def tokenizer_files(model: GgufModel) -> TokenizerFiles:
    """Return the tokenizer in a file.

    Raises GgufModelError for a file without one, and for one that tokenizer.json cannot express.
    """
    keys = model.key_values
    kind = keys.get(f"{PREFIX}model", "none")
    tokens, types = keys.get(f"{PREFIX}tokens"), keys.get(f"{PREFIX}token_type")
    if kind in ("none", "no_vocab") or not tokens:
        raise GgufModelError(f"expected a GGUF file with a tokenizer, found none in {model.path}")
    if kind not in (BYTE_LEVEL, SENTENCEPIECE, MERGED_PIECES):
        raise GgufModelError(
            f"expected a tokenizer of kind {BYTE_LEVEL}, {SENTENCEPIECE} or {MERGED_PIECES}, found {kind!r} in "
            f"{model.path}: take the Hugging Face folder that the file was made from"
        )
    kinds = [TokenType(kind) for kind in types or [TokenType.NORMAL] * len(tokens)]
    if len(kinds) != len(tokens):
        raise GgufModelError(f"expected a type for each of {len(tokens)} tokens, found {len(kinds)} in {model.path}")
    special = special_ids(model, kind)
    vocabulary = {text: i for i, text in enumerate(tokens) if kinds[i] is not TokenType.UNUSED or text != f"[PAD{i}]"}
    try:
        parts = _byte_level(model, vocabulary) if kind == BYTE_LEVEL else _sentencepiece(model, vocabulary, special)
    except UnknownPretokenizerError as error:
        raise GgufModelError(f"{error} as {PREFIX}pre in {model.path}") from None
    around = frame(model, kind)
    tables = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(index, tokens[index], kinds[index] is not TokenType.USER_DEFINED)
            for index in range(len(tokens))
            if kinds[index] in WHOLE
        ],
        **parts,
        "post_processor": _post_processor(tokens, special, around, parts["post_processor"]),
    }
    config: dict[str, Any] = {f"{name}_token": tokens[index] for name, index in special.items()}
    config |= {f"add_{name}_token": added for name, added in around.items()}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return TokenizerFiles(tables, config, keys.get("tokenizer.chat_template"))


def special_ids(model: GgufModel, kind: str) -> dict[str, int]:
    """Return the ids of special tokens by our names."""
    found = dict(DEFAULT_IDS.get(kind, {}))
    for name, theirs in SPECIAL.items():
        if (index := model.key_values.get(f"{PREFIX}{theirs}_token_id")) is not None:
            found[name] = index
    count = len(model.key_values[f"{PREFIX}tokens"])
    return {name: index for name, index in found.items() if 0 <= index < count}


def frame(model: GgufModel, kind: str) -> dict[str, bool]:
    """Return whether BOS is put before a text, and EOS after it, with llama.cpp's defaults."""
    keys = model.key_values
    bos = kind != BYTE_LEVEL or canonical_name(keys.get(f"{PREFIX}pre", "")) in ADDS_BOS
    return {
        "bos": bool(keys.get(f"{PREFIX}add_bos_token", bos)),
        "eos": bool(keys.get(f"{PREFIX}add_eos_token", False)),
    }


def _byte_level(model: GgufModel, vocabulary: Mapping[str, int]) -> dict[str, Any]:
    pre_tokenizer, ignore_merges = pre_tokenizer_of(model.key_values.get(f"{PREFIX}pre", ""))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    merges = [merge.split(" ", 1) for merge in model.key_values.get(f"{PREFIX}merges", [])]
    return {
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level,
        "model": _bpe(vocabulary, merges) | {"ignore_merges": ignore_merges},
    }


def _sentencepiece(model: GgufModel, vocabulary: Mapping[str, int], special: Mapping[str, int]) -> dict[str, Any]:
    """Return the parts of a tokenizer of pieces that merges the pair whose result has the highest score.

    gemma4's merges are in the file, and apply within lines.
    """
    keys, by_lines = model.key_values, model.key_values[f"{PREFIX}model"] == MERGED_PIECES
    tokens, scores = keys[f"{PREFIX}tokens"], keys.get(f"{PREFIX}scores")
    if by_lines:
        merges = [tuple(merge.split(" ", 1)) for merge in keys.get(f"{PREFIX}merges", [])]
    elif scores and len(scores) == len(tokens):
        merges = generate_merges(vocabulary, {text: scores[index] for text, index in vocabulary.items()})
    else:
        raise GgufModelError(f"expected a score for each of {len(tokens)} tokens in {model.path}, found none")
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}]
    strip: list[dict[str, Any]] = []
    if keys.get(f"{PREFIX}add_space_prefix", not by_lines):
        steps.insert(0, {"type": "Prepend", "prepend": SPACE_MARK})
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *strip,
    ]
    unknown = {"unk_token": tokens[special["unk"]], "fuse_unk": True} if "unk" in special else {}
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": LINES}, "behavior": "Isolated", "invert": False}
        if by_lines
        else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(vocabulary, merges) | {"byte_fallback": True} | unknown,
    }


def _bpe(vocabulary: Mapping[str, int], merges: Sequence[Sequence[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": [list(pair) for pair in merges],
    }


def _added(index: int, text: str, special: bool) -> dict[str, Any]:
    """Return an added token, which is found in text as it is."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text, **flags, "special": special}


def _post_processor(
    tokens: Sequence[str], special: Mapping[str, int], around: Mapping[str, bool], first: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Return the step that puts BOS and EOS around a text, after ``first``."""
    names = {name: tokens[special[name]] for name, added in around.items() if added and name in special}
    if not names:
        return first
    single: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    for kind in (single, pair):
        if "bos" in names:
            kind.insert(0, {"SpecialToken": {"id": names["bos"], "type_id": 0}})
        if "eos" in names:
            kind.append({"SpecialToken": {"id": names["eos"], "type_id": 0}})
    ids = {text: {"id": text, "ids": [special[name]], "tokens": [text]} for name, text in names.items()}
    template = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": ids}
    return template if first is None else {"type": "Sequence", "processors": [first, template]}
