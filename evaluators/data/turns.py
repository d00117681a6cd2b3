"""This module decides which token follows when a model writes text for itself: its own, or one of the chat template.

The model writes the user's turns as well as its own. Where a turn ends, the template's tokens up to the next turn are
put in; so are those of a new conversation after EXCHANGES. A model without chat template goes on from its first token.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from evaluators.data.chat_template import turns
from evaluators.data.documents import TextError
from evaluators.data.tokenizer import ModelTokenizer

EXCHANGES = 2  # of user and assistant in a conversation
LONGEST_QUERY = 256  # tokens of a user's turn; an answer may go on to the end of the window


@dataclass(frozen=True)
class Script:
    """Holds the token ids that stand around what a model writes.

    ``start`` begins every window. ``breaks`` stand after one turn after the other, in a circle, users' turns and
    assistants' by turns; without breaks all is one text. ``ends`` are the ids that end a turn, for each of ``breaks``.
    """

    start: tuple[int, ...]
    breaks: tuple[tuple[int, ...], ...] = ()
    ends: tuple[frozenset[int], ...] = ()


def script_of(tokenizer: ModelTokenizer, ends: Iterable[int] = ()) -> Script:
    """Return what stands around text that the model of ``tokenizer`` writes; ``ends`` are ids that end its answers.

    Where the template marks the end of a user's turn by no token of its own, the turn is a line. Raises TextError for a
    model with neither chat template nor a token that begins or ends a text.
    """
    first = () if tokenizer.bos is None else (tokenizer.bos,)
    found = turns(tokenizer)
    if found is None:
        named = (tokenizer.special[name] for name in ("bos", "eos") if name in tokenizer.special)
        start = first or tuple(named)[:1]
        if not start:
            raise TextError(
                "expected a chat template or a BOS or EOS token, found a tokenizer with neither to begin with"
            )
        return Script(start)
    pieces = (found.before, found.after_user, found.after_assistant, found.end + found.before)
    before, after_user, after_assistant, anew = (tuple(ids) for ids in tokenizer.encode(pieces))
    breaks = (after_user, after_assistant) * (EXCHANGES - 1) + (after_user, anew)
    everywhere = {*ends, *([] if tokenizer.eos is None else [tokenizer.eos])}
    special = {token["id"] for token in tokenizer.tables.get("added_tokens", ()) if token.get("special")}
    after = []
    for index, ids in enumerate(breaks):
        own = set(ids[:1]) & special
        after.append(frozenset(everywhere | (own or (lines(tokenizer) if index % 2 == 0 else set()))))
    return Script(first + before, breaks, tuple(after))


def lines(tokenizer: ModelTokenizer) -> set[int]:
    """Return the ids of all tokens with an end of a line."""
    return {
        index
        for index in tokenizer.backend.get_vocab().values()
        if "\n" in tokenizer.backend.decode([index], skip_special_tokens=False)
    }


@dataclass
class Pen:
    """Writes one window, after its start: takes the token that the model chose, and says which one stands there."""

    script: Script
    turn: int = 0  # index into the script's breaks
    length: int = 0  # tokens of this turn
    waiting: deque[int] = field(default_factory=deque)  # tokens of the template that come next

    def next(self, chosen: int) -> int:
        """Return the token that follows, where the model would go on with ``chosen``."""
        script = self.script
        if not self.waiting and script.breaks:
            too_long = self.turn % 2 == 0 and self.length >= LONGEST_QUERY
            if chosen in script.ends[self.turn] or too_long:
                self.waiting.extend(script.breaks[self.turn])
                self.turn, self.length = (self.turn + 1) % len(script.breaks), 0
        if self.waiting:
            return self.waiting.popleft()
        self.length += 1
        return chosen
