"""A text is UTF-8 or refused, a large file is read in pieces, and a file is divided whatever its lines are."""

from itertools import pairwise
from pathlib import Path

import pytest

from evaluators.data import documents
from evaluators.data.documents import FilePart, TextError, divide_file, file_documents

SHARES = {"calibration": 0.4, "search": 0.2, "validation": 0.2, "test": 0.2}
MIXED = "a Größe\r\n数学 🙂 line\rend\n" * 40


def test_one_file_is_divided_into_disjoint_parts(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {n}\n" for n in range(100)))
    parts = divide_file(path, SHARES)
    assert "".join(part[0][:] for part in parts.values()) == path.read_text()
    assert parts["calibration"][0][:].count("\n") == 40


def test_a_file_of_one_line_is_divided_by_length(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog and counts to 12345 " * 7000)
    parts = divide_file(path, SHARES)
    assert "".join(part[0][:] for part in parts.values()) == path.read_text()
    sizes = [len(part[0]) / path.stat().st_size for part in parts.values()]
    assert sizes == pytest.approx(list(SHARES.values()), abs=0.02)


def test_a_large_file_is_divided_at_ends_of_lines_and_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(MIXED.encode())
    monkeypatch.setattr(documents, "WHOLE_FILE", 100)
    parts = [part[0] for part in divide_file(path, SHARES).values()]
    assert all(isinstance(part, FilePart) for part in parts)
    assert "".join(part[:] for part in parts) == path.read_text()
    assert all(part[:].endswith("\n") for part in parts)
    whole = FilePart(path, 0, path.stat().st_size)
    for step in (1, 2, 3, 7):  # pieces cut within characters lose and repeat none
        cuts = [*range(0, len(whole), step), len(whole)]
        pieces = "".join(whole[start:stop] for start, stop in pairwise(cuts))
        assert pieces.replace("\n\n", "\n") == path.read_text()  # \r\n may be cut in two


def test_a_large_file_without_lines_is_cut_between_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("数学🙂".encode() * 1000)
    monkeypatch.setattr(documents, "WHOLE_FILE", 100)
    monkeypatch.setattr(documents, "LONG_LINE", 50)
    assert "".join(part[0][:] for part in divide_file(path, SHARES).values()) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\n".encode("utf-16"), "expected UTF-8 text in .*, found UTF-16"),
        ("text\n".encode("utf-16-be"), "found a NUL character at byte 0: is it UTF-16"),
        (b"12345 caf\xe9\n", "found byte 0xe9 at 9: convert it with iconv"),
        (b"12345\0", "found a NUL character at byte 5"),
    ],
)
@pytest.mark.parametrize("whole", [True, False], ids=["small", "large"])
def test_text_that_is_not_utf8_is_refused_in_one_sentence(
    content: bytes, message: str, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    monkeypatch.setattr(documents, "WHOLE_FILE", 100 if whole else 0)
    with pytest.raises(TextError, match=message) as refusal:
        file_documents({"test": path})["test"][0][:]
    assert "\n" not in str(refusal.value)


def test_the_same_file_for_two_splits_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("text\n")
    with pytest.raises(TextError, match="splits must be disjoint"):
        file_documents({"search": path, "test": path})
