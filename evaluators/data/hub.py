"""This module reads data sets through the datasets library, where it is installed: texts, or conversations."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from evaluators.data.chat import MESSAGES, check_messages, said
from evaluators.data.chat_template import render
from evaluators.data.documents import TextError, divided_rows
from evaluators.data.texts import Rows
from evaluators.data.tokenizer import ModelTokenizer

LIBRARY = "datasets"
COLUMNS = ("text", MESSAGES)  # that are looked for where none is named


@dataclass(frozen=True)
class Column:
    """Reads a column of a data set: texts, or lists of messages, which the model's chat template writes."""

    table: Any  # a datasets.Dataset
    name: str
    what: str  # names the data set in errors
    tokenizer: ModelTokenizer

    def value(self, index: int) -> str | list[Any]:
        """Return a row's text or messages. Raises TextError, naming the row, for anything else."""
        found = self.table[index][self.name]
        if isinstance(found, str):
            return found
        try:
            if not isinstance(found, list):
                raise TextError(f"expected text or a list of {MESSAGES}, found a {type(found).__name__}")
            check_messages(found)
        except TextError as error:
            raise TextError(f"row {index} of column {self.name} in {self.what}: {error}") from None
        return found

    def row(self, index: int) -> str:
        """Return a row as text, a conversation by the chat template. Raises TextError, naming the row."""
        found = self.value(index)
        try:
            return found if isinstance(found, str) else render(self.tokenizer, found)
        except TextError as error:
            raise TextError(f"row {index} of column {self.name} in {self.what}: {error}") from None

    def plain(self, index: int) -> str:
        """Return a row's text, or what is said in its conversation."""
        found = self.value(index)
        return found if isinstance(found, str) else said({MESSAGES: found})

    def rows(self, start: int, stop: int) -> Rows:
        """Return the rows from ``start`` to before ``stop`` as text."""
        chat = not isinstance(self.value(start), str)
        return Rows(stop - start, lambda i: self.row(start + i), lambda i: self.plain(start + i), special=chat)


def dataset_rows(
    name: str,
    subset: str | None,
    split: str,
    revision: str | None,
    column: str | None,
    shares: Mapping[str, float],
    tokenizer: ModelTokenizer,
) -> dict[str, Rows]:
    """Divide the rows of a data set's ``split`` into consecutive parts by ``shares``.

    ``name`` is an id of the Hugging Face hub or a folder, as ``datasets.load_dataset`` takes it. Without a ``column``
    it is "text" or "messages". Raises TextError if the library is not installed, if it cannot load the data set, or if
    that has another form.
    """
    if find_spec(LIBRARY) is None:
        raise TextError(f"expected the package {LIBRARY} for source: datasets, found none: pip install {LIBRARY}")
    try:
        table = import_module(LIBRARY).load_dataset(name, subset, split=split, revision=revision)
    except Exception as error:  # whatever the library makes of an id, a network or a file
        found = " ".join(str(error).split()) or type(error).__name__
        raise TextError(f"expected a data set {name} that can be loaded, found: {found}") from None
    what = f"{name}, {split}"
    names = [column] if column else [known for known in COLUMNS if known in table.column_names]
    if not names or names[0] not in table.column_names:
        raise TextError(
            f"expected a column {column or ' or '.join(COLUMNS)} in {what}, found {', '.join(table.column_names)}: "
            "choose by column"
        )
    found_column = Column(table, names[0], what, tokenizer)
    return {part: found_column.rows(*bounds) for part, bounds in divided_rows(len(table), shares, what).items()}
