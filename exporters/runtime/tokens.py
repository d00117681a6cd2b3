"""Compares the tokens that llama.cpp makes of a text, reading the exported file, with the model's own."""

import logging
from pathlib import Path

from evaluators.data.tokenizer import find_tokenizer
from exporters.runtime.llamacpp import LlamaCppRuntime

log = logging.getLogger(__name__)

SHOWN = 8  # ids of a difference


def check_tokens(runtime: LlamaCppRuntime, model: Path, text: str) -> None:
    """Log a warning where llama.cpp's tokens of ``text`` are not those of the tokenizer in the folder ``model``.

    The figures of a proof are of given tokens, so they do not show it. Spaces at the beginning are left out: a
    SentencePiece-style tokenizer and llama.cpp may differ in them. Raises LlamaCppError if llama.cpp gives no answer.
    """
    tokenizer, text = find_tokenizer(model), text.lstrip()
    if tokenizer is None or not text:
        return
    ours, theirs = tokenizer.ids(text), runtime.tokenize(text)
    if (found := difference(ours, theirs)) is None:
        return
    start, one, other = found
    log.warning(
        "llama.cpp makes other tokens of text than the model: of %d tokens of test text, from the %d-th on (%r) %s in "
        "place of %s; figures on given tokens do not show what that costs",
        len(ours), start + 1, tokenizer.decode(one or ours[start : start + 1]), other, one,
    )  # fmt: skip


def difference(ours: list[int], theirs: list[int]) -> tuple[int, list[int], list[int]] | None:
    """Return where two lists of ids first differ, and up to SHOWN ids of each from there on; None if they agree."""
    start = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    if start is None and len(ours) == len(theirs):
        return None
    start = min(len(ours), len(theirs)) if start is None else start
    return start, ours[start : start + SHOWN], theirs[start : start + SHOWN]
