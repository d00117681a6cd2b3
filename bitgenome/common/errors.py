"""Defines the base class of all errors that the user can fix."""


class UserError(ValueError):
    """An error that the user can fix, told in one sentence: what was expected, what was found, and where.

    The command line prints the sentence and exits with code 2.
    """


class StorageError(UserError):
    """Raised when storage cannot be read or written."""
