"""Defines where runs are stored: in a directory, or behind an fsspec URL with a local directory as its mirror."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from bitgenome.common import layout
from bitgenome.common.section import Section
from bitgenome.config.paths import UserPath
from workers.storage.folders import is_url, mirror_root

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # of runs, studies and batches: a directory below storage_path
RESERVED = (layout.SHARED,)  # directories below storage_path that are no run's


def not_reserved(name: str) -> str:
    """Return ``name``. Raises ValueError for that of a directory which runs share."""
    if name.lower() in RESERVED:  # some file systems do not tell A from a
        raise ValueError(f"expected a name other than {name!r}, where runs keep what they share")
    return name


Name = Annotated[str, Field(pattern=NAME), AfterValidator(not_reserved)]


class StoredSection(Section):
    """Settings of something that is stored, such as a run or a study."""

    storage_path: UserPath = Field(
        Path("runs"), description="folder, or URL such as s3://bucket/prefix or file:///nfs/runs"
    )
    storage_url: str | None = Field(None, description="of which storage_path is the mirror: filled in, not given")

    @model_validator(mode="before")
    @classmethod
    def mirrored(cls, data: Any) -> Any:
        """Fill in ``storage_url`` and its local mirror if storage is behind a URL.

        The URL is given as ``storage_path``, or was recorded by another machine. The mirror is this machine's own
        directory.
        """
        if not isinstance(data, dict):
            return data
        given = data.get("storage_path")
        url = given if isinstance(given, str) and is_url(given) else data.get("storage_url")
        if not isinstance(url, str):
            return data
        url = url.rstrip("/")
        return {**data, "storage_url": url, "storage_path": mirror_root(url)}

    @property
    def storage_root(self) -> str:
        """The storage root as a user would give it: a path or URL."""
        return self.storage_url or str(self.storage_path)
