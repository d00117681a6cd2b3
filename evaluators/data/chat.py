"""This module reads conversations from JSON lines: a list of ``messages`` each, with a ``role`` and ``content``."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from evaluators.data.chat_template import render
from evaluators.data.documents import TextError, divided_rows
from evaluators.data.texts import Rows
from evaluators.data.tokenizer import ModelTokenizer

MESSAGES, ROLE, CONTENT, TOOLS = "messages", "role", "content", "tools"
CHECKED_BYTES = 1 << 26  # of a file whose lines are all checked; of a larger one those that are taken
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class ChatFile:
    """Reads conversations from a file of JSON lines, a line when it is asked for."""

    path: Path
    tokenizer: ModelTokenizer

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """Number (from 1) and first byte of every line that is not blank."""
        found, start = [], 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    found.append((number, start))
                start += len(line)
        return found

    def conversation(self, index: int) -> dict[str, Any]:
        """Return a line as an object with checked messages. Raises TextError, naming file and line."""
        number, start = self.places[index]
        with self.path.open("rb") as file:
            file.seek(start)
            line = file.readline()
        try:
            return checked(json.loads(line.removeprefix(BYTE_ORDER_MARK)))
        except TextError as error:
            problem = str(error)
        except UnicodeDecodeError:
            problem = "expected UTF-8, found other bytes"
        except ValueError as error:
            problem = f"expected a JSON object, found none ({error})"
        raise TextError(f"line {number} of {self.path}: {problem}")

    def row(self, index: int) -> str:
        """Return a conversation as the chat template writes it. Raises TextError, naming file and line."""
        found = self.conversation(index)
        try:
            return render(self.tokenizer, found[MESSAGES], found.get(TOOLS))
        except TextError as error:
            raise TextError(f"line {self.places[index][0]} of {self.path}: {error}") from None

    def plain(self, index: int) -> str:
        """Return what is said in a conversation, without the template."""
        return said(self.conversation(index))

    def rows(self, start: int, stop: int) -> Rows:
        """Return the conversations from ``start`` to before ``stop`` as text."""
        return Rows(stop - start, lambda i: self.row(start + i), lambda i: self.plain(start + i), special=True)

    def check(self) -> None:
        """Raise TextError if the first conversation, or any of a file that is not large, cannot be read."""
        if not self.places:
            raise TextError(f"expected conversations in {self.path}, found an empty file")
        self.row(0)
        if self.path.stat().st_size <= CHECKED_BYTES:
            for index in range(len(self.places)):
                self.conversation(index)


def checked(record: Any) -> dict[str, Any]:
    """Return ``record`` if it is an object with messages, and tools at most a list. Raises TextError for another."""
    if not isinstance(record, dict):
        raise TextError(f"expected an object with {MESSAGES}, found a {type(record).__name__}")
    check_messages(record.get(MESSAGES), f"found none among its keys {', '.join(map(str, record)) or '(none)'}")
    if not isinstance(record.get(TOOLS, []), list | None):
        raise TextError(f"expected a list of {TOOLS}, found a {type(record[TOOLS]).__name__}")
    return record


def check_messages(messages: Any, without: str = "found none") -> None:
    """Raise TextError unless ``messages`` is a list of objects with a role; ``without`` says what None is."""
    if messages is None:
        raise TextError(f"expected {MESSAGES}, {without}")
    if not isinstance(messages, list) or not messages:
        raise TextError(f"expected a list of {MESSAGES}, found {messages!r:.40}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get(ROLE), str):
            raise TextError(f"expected messages with {ROLE} and {CONTENT}, found {message!r:.80}")


def said(conversation: Mapping[str, Any]) -> str:
    """Return the contents of a conversation's messages that are text, a line each."""
    return "\n".join(m[CONTENT] for m in conversation[MESSAGES] if isinstance(m.get(CONTENT), str))


def divide_chat(path: Path, shares: Mapping[str, float], tokenizer: ModelTokenizer) -> dict[str, Rows]:
    """Divide the conversations of a file into consecutive parts by ``shares``, relative numbers of conversations.

    Raises TextError for a file that is missing, holds something else, or too little.
    """
    file = opened(path, tokenizer)
    return {split: file.rows(*part) for split, part in divided_rows(len(file.places), shares, str(path)).items()}


def chat_files(files: Mapping[str, Path], tokenizer: ModelTokenizer) -> dict[str, Rows]:
    """Return the conversations of a file for each split. Raises TextError as ``divide_chat``."""
    if len({path.resolve() for path in files.values()}) < len(files):
        raise TextError("expected a file of its own for each split, found the same file twice: splits must be disjoint")
    opened_files = {split: opened(path, tokenizer) for split, path in files.items()}
    return {split: file.rows(0, len(file.places)) for split, file in opened_files.items()}


def opened(path: Path, tokenizer: ModelTokenizer) -> ChatFile:
    """Return a file of conversations whose lines are checked."""
    if not path.is_file():
        raise TextError(f"expected a file of conversations, found nothing at {path}")
    file = ChatFile(path, tokenizer)
    file.check()
    return file
