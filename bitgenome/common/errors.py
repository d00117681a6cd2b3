"""The one base of all errors that are the user's to mend."""


class UserError(ValueError):
    """One sentence: what was expected, what was found, where. The command line prints it and exits with code 2."""


class StorageError(UserError):
    """Storage that cannot be read or written."""
