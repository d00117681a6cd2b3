"""This module reads the documents of the four splits: modules of the standard library, or UTF-8 files.

A document is a text of which pieces can be taken. Small files are in memory; of large ones only the pieces that are
asked for are read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from bitgenome.common.errors import UserError
from evaluators.data.stdlib import SPLITS, read_modules

WHOLE_FILE = 1 << 22  # bytes of a file up to which it is read at once
LONG_LINE = 1 << 13  # characters; a longer line counts as several when a file is divided
CHARACTER = 4  # bytes of the longest one in UTF-8
BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16 or UTF-32", b"\xfe\xff": "UTF-16", b"\x00\x00\xfe\xff": "UTF-32"}


class TextError(UserError):
    """Raised for text that is missing, too short or shared by two splits; the message is one sentence for the user."""


class Document(Protocol):
    """A text: ``str``, or a part of a file that behaves like one when a piece is taken."""

    def __len__(self) -> int: ...

    def __getitem__(self, piece: slice, /) -> str: ...


@dataclass(frozen=True)
class FilePart:
    """Bytes ``start`` to ``stop`` of a UTF-8 file as a text, whose length and pieces are in bytes, read when taken."""

    path: Path
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, piece: slice) -> str:
        """Return the characters that begin within the piece. Raises TextError for bytes that are not UTF-8."""
        start, stop, _ = piece.indices(len(self))
        with self.path.open("rb") as file:
            file.seek(self.start + start)
            data = file.read(min(stop + CHARACTER - 1, len(self)) - start)
        first = _continuation(data) if start else 0
        last = stop - start + _continuation(data[stop - start :])
        return decode_text(data[first:last], self.path, self.start + start + first)


def _continuation(data: bytes) -> int:
    """Return how many bytes at the start of ``data`` continue a character that began before, at most 3."""
    count = 0
    while count < min(len(data), CHARACTER - 1) and data[count] & 0xC0 == 0x80:
        count += 1
    return count


def decode_text(data: bytes, path: Path, offset: int = 0) -> str:
    """Return the text in ``data``, which stands at byte ``offset`` of ``path``, with ``\\n`` at the end of its lines.

    Raises TextError unless it is UTF-8 without NUL characters, which text in UTF-16 has.
    """
    if offset == 0 and (found := next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), "")):
        raise TextError(f"expected UTF-8 text in {path}, found {found}: convert it with iconv -t UTF-8")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"expected UTF-8 text in {path}, found byte 0x{data[error.start]:02x} at {offset + error.start}: convert "
            "it with iconv -t UTF-8"
        ) from None
    if (place := data.find(b"\0")) >= 0:
        raise TextError(
            f"expected UTF-8 text in {path}, found a NUL character at byte {offset + place}: is it UTF-16, or no text?"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def stdlib_documents(held_out: Mapping[str, Sequence[str]]) -> dict[str, list[Document]]:
    """Return the sources of the held-out modules by split, from the running interpreter's standard library."""
    return {split: [*read_modules(held_out[split]).values()] for split in SPLITS}


def file_documents(files: Mapping[str, Path]) -> dict[str, list[Document]]:
    """Return one document per split from UTF-8 ``files``.

    Raises TextError for a file that is missing, shared by two splits, or not UTF-8.
    """
    if len({path.resolve() for path in files.values()}) < len(files):
        raise TextError("expected a file of its own for each split, found the same file twice: splits must be disjoint")
    for split, path in files.items():
        if not path.is_file():
            raise TextError(f"expected a text file for the {split} split, found nothing at {path}")
    return {split: [_document(path)] for split, path in files.items()}


def _document(path: Path) -> Document:
    size = path.stat().st_size
    return FilePart(path, 0, size) if size > WHOLE_FILE else decode_text(path.read_bytes(), path)


def divide_file(path: Path, shares: Mapping[str, float]) -> dict[str, list[Document]]:
    """Divide one UTF-8 file into consecutive parts at ends of lines, one document per split.

    ``shares`` are relative numbers of lines, in a file of more than WHOLE_FILE bytes of bytes; they need not add up to
    1. A line of more than LONG_LINE characters is several lines. Raises TextError if there is no such file, or if it is
    not UTF-8.
    """
    if not path.is_file():
        raise TextError(f"expected a text file, found nothing at {path}")
    document = _document(path)
    bounds = np.cumsum([0.0, *shares.values()]) / sum(shares.values())
    if isinstance(document, FilePart):
        cuts = [0, *(_line_end(path, int(bound * len(document))) for bound in bounds[1:-1]), len(document)]
        parts: list[Document] = [FilePart(path, start, stop) for start, stop in pairwise(cuts)]
    else:
        lines = list(_lines(document[:]))
        cuts = (bounds * len(lines)).astype(int).tolist()
        parts = ["".join(lines[start:stop]) for start, stop in pairwise(cuts)]
    return {split: [part] for split, part in zip(shares, parts, strict=True)}


def divided_rows(count: int, shares: Mapping[str, float], what: str) -> dict[str, tuple[int, int]]:
    """Return for each split of ``shares`` its first of ``count`` rows, and the one after its last.

    Raises TextError, naming ``what`` is divided, if a split would get none.
    """
    cuts = (np.cumsum([0.0, *shares.values()]) / sum(shares.values()) * count).round().astype(int).tolist()
    bounds = dict(zip(shares, pairwise(cuts), strict=True))
    if empty := next((split for split, (start, stop) in bounds.items() if start == stop), None):
        raise TextError(f"expected enough rows in {what} for every split, found {count}, and none for {empty}")
    return bounds


def _lines(text: str) -> Iterator[str]:
    """Yield the lines of ``text`` with their ends, in pieces of LONG_LINE characters where they are longer."""
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), LONG_LINE):
            yield line[start : start + LONG_LINE]


def _line_end(path: Path, place: int) -> int:
    """Return the byte after the first end of a line from ``place`` on; without one nearby, where a character begins."""
    with path.open("rb") as file:
        file.seek(place)
        data = file.read(LONG_LINE)
    return place + (data.find(b"\n") + 1 or _continuation(data))
