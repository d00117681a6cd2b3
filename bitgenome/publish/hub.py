"""Publishes files to a Hugging Face hub, through huggingface_hub."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitgenome.common.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


class Hub:
    """Speaks to the hub at $HF_ENDPOINT, by default huggingface.co, with the token of $HF_TOKEN or ``hf auth login``.

    Raises UserError if huggingface_hub is not installed.
    """

    def __init__(self) -> None:
        try:
            import huggingface_hub as client  # noqa: PLC0415 - may be missing
        except ImportError:
            raise UserError("expected huggingface_hub, found it not installed: pip install huggingface_hub") from None
        self._client = client
        self._api: HfApi = client.HfApi(
            endpoint=os.environ.get("HF_ENDPOINT"), library_name="bitgenome", library_version=version("bitgenome")
        )

    @property
    def endpoint(self) -> str:
        """The URL of the hub."""
        return str(self._api.endpoint)

    def check(self, repository: str) -> None:
        """Raise UserError unless ``repository`` is an id USER/NAME, and there is a token to write with."""
        try:
            self._client.utils.validate_repo_id(repository)
        except self._client.errors.HFValidationError:
            valid = False
        else:
            valid = repository.count("/") == 1
        if not valid:
            raise UserError(f"expected a repository as USER/NAME, found {repository!r}")
        if not self._client.get_token():
            raise UserError(f"expected a token for {self.endpoint}, found none: hf auth login, or give it as HF_TOKEN")

    def files(self, repository: str) -> set[str] | None:
        """Return the names of the files in a repository, None if there is none. Raises UserError."""
        with self._errors(repository):
            try:
                found = self._api.model_info(repository)  # of one request, without retries
            except self._client.errors.RepositoryNotFoundError:
                return None
        return {file.rfilename for file in found.siblings or ()}

    def about(self, model: str) -> Mapping[str, Any]:
        """Return what the card of a model says at its beginning; {} where it cannot be read."""
        try:
            card = self._api.model_info(model).card_data
        except Exception:
            return {}
        return card.to_dict() if card else {}

    def publish(self, repository: str, files: Mapping[str, Path | bytes], private: bool, message: str) -> str:
        """Commit ``files`` to a repository, which is created if it is not there, and return its URL.

        Files of these names are replaced, all others stay. Raises UserError.
        """
        add = self._client.CommitOperationAdd
        operations = [
            add(path_in_repo=name, path_or_fileobj=file if isinstance(file, bytes) else str(file))
            for name, file in files.items()
        ]
        with self._errors(repository):
            created = self._api.create_repo(repository, private=private or None, exist_ok=True)
            self._api.create_commit(repository, operations, commit_message=message)
        return str(created)

    @contextmanager
    def _errors(self, repository: str) -> Iterator[None]:
        """Turn what the client raises into a UserError."""
        of_transport = getattr(self._client.errors, "HTTPError", OSError)  # httpx's, of the version that it uses
        try:
            yield
        except (self._client.errors.HfHubHTTPError, of_transport, OSError, ValueError) as error:
            said = " ".join(str(error).split())
            raise UserError(f"expected {self.endpoint} to take {repository}, found: {said[:300]}") from None
