"""Finds the pre-tokenizer of llama.cpp that splits text in the same way as a byte-level BPE tokenizer, and back.

llama.cpp has its splitting patterns compiled in and selects one by ``tokenizer.ggml.pre`` (llama-vocab.cpp). The table
is keyed by the pattern in tokenizer.json, as published with the models that llama.cpp's names refer to.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitgenome.common.errors import UserError

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = "<gpt-2>"  # ByteLevel's built-in pattern
DIGITS = "<digits>"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORD = r"[^\r\n\p{L}\p{N}]?"


class UnknownPretokenizerError(UserError):
    """Raised if no pre-tokenizer of llama.cpp splits text as the model's does; the message is one sentence."""


@dataclass(frozen=True)
class Splitting:
    """Describes how a tokenizer splits text: patterns, applied in order, and whether known words skip the merges."""

    patterns: tuple[str, ...]
    ignore_merges: bool


def _cased(tail: str, digits: str) -> str:
    return rf"{WORD}{UPPER}*{LOWER}+{tail}|{WORD}{UPPER}+{LOWER}*{tail}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{SPACES}"


_QWEN2 = rf"{CONTRACTIONS}|{WORD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{SPACES}"
_LLAMA3 = rf"{CONTRACTIONS}|{WORD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{SPACES}"
_QWEN35 = rf"{CONTRACTIONS}|{WORD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{SPACES}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # where other patterns follow it
_DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*{SPACES}"
)
KNOWN = {
    Splitting((_QWEN2,), False): "qwen2",
    Splitting((_LLAMA3,), True): "llama-bpe",
    Splitting((_LLAMA3,), False): "dbrx",
    Splitting((_QWEN35,), False): "qwen35",
    Splitting((_cased("", r"\p{N}"),), True): "tekken",
    Splitting((_cased(f"{CONTRACTIONS}?", r"\p{N}{1,3}"),), False): "gpt-4o",
    Splitting((GPT2,), False): "gpt-2",
    Splitting((DIGITS, GPT2), False): "smollm",
    Splitting((r"\p{N}{1,3}", "[一-龥\u3040-ゟ\u30a0-ヿ]+", _DEEPSEEK), False): "deepseek-v3",
    Splitting(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", DIGITS), False): "deepseek-coder",
    Splitting((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"), False): "falcon",
    Splitting((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"), False): "default",
}
# Other names of llama.cpp for the same splitting; of those that skip the merges of known words, BOS is the default
ALIASES = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    "dbrx": ("smaug-bpe", "glm4", "chatglm-bpe"),
    "qwen2": ("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
    "deepseek-v3": ("hunyuan-dense", "joyai-llm"),
    "gpt-4o": ("llama4", "kanana2", "talkie", "minimax-m2"),
    "gpt-2": (
        "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "mpt", "olmo", "jais", "trillion", "granite-docling",
    ),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
}  # fmt: skip
ADDS_BOS = ("llama-bpe", "tekken")


def canonical_name(name: str) -> str:
    """Return the name in KNOWN of the splitting that llama.cpp does under ``name``.

    Raises UnknownPretokenizerError for a splitting that is not in the table.
    """
    for known, aliases in ALIASES.items():
        if name in aliases:
            return known
    if name not in KNOWN.values():
        names = sorted([*KNOWN.values(), *(alias for aliases in ALIASES.values() for alias in aliases)])
        raise UnknownPretokenizerError(f"expected a pre-tokenizer among {', '.join(names)}, found {name or 'none'}")
    return name


def pre_tokenizer_of(name: str) -> tuple[dict[str, Any], bool]:
    """Return tokenizer.json's ``pre_tokenizer`` and ``ignore_merges`` for a name of llama.cpp.

    Raises UnknownPretokenizerError as ``canonical_name`` does.
    """
    known = canonical_name(name)
    splitting = next(splitting for splitting, found in KNOWN.items() if found == known)
    steps: list[dict[str, Any]] = []
    for pattern in splitting.patterns:
        if pattern == DIGITS:
            steps.append({"type": "Digits", "individual_digits": True})
        elif pattern != GPT2:
            steps.append({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})
    by_regex = GPT2 in splitting.patterns
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": by_regex})
    return {"type": "Sequence", "pretokenizers": steps}, splitting.ignore_merges


def pretokenizer_name(tokenizer: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the pre-tokenizer of ``tokenizer``, the contents of a tokenizer.json.

    Raises UnknownPretokenizerError if no name fits, because a wrong one would silently change the tokens.
    """
    patterns = tuple(p for step in _steps(tokenizer.get("pre_tokenizer")) if (p := _pattern(step)) is not None)
    splitting = Splitting(patterns, bool(tokenizer["model"].get("ignore_merges")))
    if splitting not in KNOWN:
        raise UnknownPretokenizerError(
            f"expected a pre-tokenizer that llama.cpp knows ({', '.join(KNOWN.values())}), found {list(patterns)} "
            f"with ignore_merges={splitting.ignore_merges}"
        )
    return KNOWN[splitting]


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [inner for step in pre_tokenizer["pretokenizers"] for inner in _steps(step)]
    return [pre_tokenizer]


def _pattern(step: Mapping[str, Any]) -> str | None:
    """Return the pattern by which a step splits, or None for a step that only maps bytes to characters."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": True}:
            return "<ByteLevel with add_prefix_space>"
        case {"type": "ByteLevel"}:
            return GPT2 if step.get("use_regex", True) else None
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated"}:
            return pattern
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Removed", "invert": True}:
            return pattern  # keeps the matches, which cover the text, so the pieces are the same
        case {"type": "Digits", "individual_digits": True}:
            return DIGITS
    return f"<{step['type']}>"
