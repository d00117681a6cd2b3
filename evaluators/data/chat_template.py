"""This module writes conversations as a model's own chat template has them, and takes the template apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from evaluators.data.documents import TextError
from evaluators.data.tokenizer import SPECIAL_NAMES, ModelTokenizer

# Templates may write the day. It must not change the text from day to day, so their function for it is one of Jinja.
DAY = {"%Y": "2026", "%m": "01", "%d": "01", "%B": "January", "%b": "Jan", "%y": "26", "%A": "Thursday", "%a": "Thu"}
FIXED_DAY = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('{code}', '{value}')" for code, value in DAY.items())
    + " }}{%- endmacro -%}"
)
SENTINELS = ("QUERYONE", "ANSWERONE", "QUERYTWO", "ANSWERTWO")  # what two exchanges say, to be found in their text
ROLES = ("user", "assistant")

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Turns:
    """Holds what a template writes around the turns of a conversation: before the first user turn, and after each.

    ``after_user`` ends a user turn and begins the assistant's; ``after_assistant`` the other way round; ``end`` is what
    stands after the last one.
    """

    before: str
    after_user: str
    after_assistant: str
    end: str


def render(tokenizer: ModelTokenizer, messages: Sequence[Message], tools: Sequence[Message] | None = None) -> str:
    """Return the text of a conversation, by the model's chat template.

    A BOS token at its beginning is left out where the tokenizer puts one before every text. Raises TextError if the
    model has no chat template, or one that refuses the conversation.
    """
    if tokenizer.chat_template is None:
        raise TextError("expected a model with a chat template, found one without: chat text is written by it")
    names = {name: tokenizer.backend.id_to_token(tokenizer.special[name]) for name in tokenizer.special}
    special = {f"{name}_token": names.get(name) or "" for name in SPECIAL_NAMES}
    try:
        (text,), _ = render_jinja_template(
            conversations=[list(messages)],
            tools=list(tools) if tools else None,
            chat_template=FIXED_DAY + tokenizer.chat_template,
            **special,
        )
    except Exception as error:  # whatever a template makes of a conversation that it does not expect
        found = " ".join(str(error).split()) or type(error).__name__
        raise TextError(f"expected a conversation that the model's chat template takes, found: {found}") from None
    rendered = str(text)
    return rendered.removeprefix(special["bos_token"]) if tokenizer.bos is not None else rendered


def turns(tokenizer: ModelTokenizer) -> Turns | None:
    """Return what the model's chat template writes around turns; None if it has none that can be taken apart."""
    messages = [{"role": ROLES[index % 2], "content": content} for index, content in enumerate(SENTINELS)]
    try:
        rest = render(tokenizer, messages)
    except TextError:
        return None
    pieces = []
    for sentinel in SENTINELS:
        piece, found, rest = rest.partition(sentinel)
        if not found:
            return None
        pieces.append(piece)
    return Turns(pieces[0], pieces[1], pieces[2], rest)
