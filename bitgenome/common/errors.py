"""Defines the base class of all errors that the user can fix, and turns others into it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """An error that the user can fix, told in one sentence: what was expected, what was found, and where.

    The command line prints the sentence and exits with code 2.
    """


class StorageError(UserError):
    """Raised when storage cannot be read or written."""


@contextmanager
def expecting(what: str, where: object, remedy: str = "") -> Iterator[None]:
    """Turn what Python raises of a file's wrong content into a UserError of one sentence.

    ``what`` was expected, ``where`` it is not, and ``remedy`` says what to do. Errors of the user pass through.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        ending = f": {remedy}" if remedy else ""
        raise UserError(f"expected {what} in {where}, found {found_in(error)}{ending}") from None


def found_in(error: Exception) -> str:
    """Return in a few words what was found, from the error that Python raised of it."""
    if isinstance(error, json.JSONDecodeError):
        return "an empty file" if not error.doc.strip() else f"no JSON (line {error.lineno}: {error.msg.lower()})"
    if isinstance(error, UnicodeDecodeError):
        return "bytes that are no text"
    if isinstance(error, KeyError):
        return f"no {error}"
    return f"something else ({' '.join(str(error).split())[:100]})"
