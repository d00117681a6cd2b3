"""This module holds the error of a model that cannot be read or run."""

from bitgenome.common.errors import UserError


class ModelFolderError(UserError):
    """Raised for a folder that is not a readable model; the message is one sentence for the user."""
