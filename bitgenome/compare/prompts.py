"""The prompts that files are compared on."""

from collections.abc import Sequence
from pathlib import Path

from bitgenome.common.errors import UserError


def prompts_of(given: Sequence[str], file: Path | None) -> list[str]:
    """Return the prompts ``given`` and those in ``file``, one a line; empty lines do not count.

    Raises UserError for a file that is missing, empty or no text, and for a prompt of nothing but white space.
    """
    if any(not prompt.strip() for prompt in given):
        raise UserError("expected --prompt with text, found an empty one")
    if file is None:
        return list(given)
    if not file.is_file():
        raise UserError(f"expected a file of prompts, found none at {file}")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"expected prompts in UTF-8 in {file}, found bytes that are no text") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError(f"expected prompts in {file}, one a line, found none")
    return [*given, *found]
