"""Chooses the text of a run that says nothing of it, and fits tokens to what a text holds."""

from pathlib import Path
from typing import Any

from bitgenome.common.errors import UserError
from bitgenome.config.text import TextConfig
from bitgenome.plan.text import HELD_OUT, texts_of, written_counts
from evaluators.data.documents import TextError
from evaluators.data.tokenizer import load_tokenizer
from evaluators.data.windows import token_windows
from evaluators.model.folder import ModelFolder
from exporters.metadata.hyperparameters import attention_window

WINDOW = 512  # tokens
CONVERSATIONS = (".jsonl", ".ndjson")


def text_settings(given: Path | None, folder: ModelFolder) -> tuple[dict[str, Any], str]:
    """Return the settings of the text, and a line on why it is that.

    ``given`` is a text file, or conversations in JSON lines. Without it the model writes for itself; one that was
    trained on Python's library, and says which modules were held out, gets those. Raises UserError for a missing file.
    """
    window = {"window": longest_window(folder)}
    if given is not None:
        if not given.is_file():
            raise UserError(f"expected a text file for --text, found none at {given}")
        source = "chat" if given.suffix in CONVERSATIONS else "file"
        kind = "conversations" if source == "chat" else "text"
        return {"source": source, "path": str(given.absolute()), **window}, f"{kind} of {given}"
    if (held_out := folder.path / HELD_OUT).is_file():
        why = "modules of Python's library that the model was not trained on"
        return {"source": "stdlib", "splits": str(held_out.absolute()), **window}, why
    templated = load_tokenizer(folder.path).chat_template is not None
    form = "turns of its chat template" if templated else "from its first token"
    return {"source": "self", **window}, f"written by the model itself, {form}: --text FILE takes text of its use"


def longest_window(folder: ModelFolder) -> int:
    """Return WINDOW, or less for a model of a shorter context or sliding window."""
    bounds = (folder.config.get("max_position_embeddings"), attention_window(folder))
    return min([WINDOW, *(bound for bound in bounds if bound)])


def fitting_tokens(text: TextConfig, folder: ModelFolder) -> dict[str, int]:
    """Return the tokens of the splits that the text is too short for as it holds them: halves of what was asked for.

    Raises TextError for a text that has less than a window for a split, or is missing.
    """
    if written_counts(text):
        return {}
    tokenizer = load_tokenizer(folder.path)
    texts, found = texts_of(text, tokenizer), {}
    for split, parts in texts.items():
        wanted = tokens = getattr(text.tokens, split)
        while True:
            try:
                token_windows(tokenizer, {split: parts}, text.window, {split: tokens}, text.seed)
                break
            except TextError:
                if tokens <= text.window:
                    raise
                tokens = max(text.window, tokens // 2 // text.window * text.window)
        if tokens < wanted:
            found[split] = tokens
    return found
