"""Where runs lie: a folder, or an fsspec URL with a folder of this machine as its mirror."""

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from bitgenome.common.section import Section
from workers.storage.folders import is_url, mirror_root


class StoredSection(Section):
    """A configuration of something that is stored."""

    storage_path: Path = Field(
        Path("runs"), description="folder, or URL such as s3://bucket/prefix or file:///nfs/runs"
    )
    storage_url: str | None = Field(None, description="of which storage_path is the mirror: filled in, not given")

    @model_validator(mode="before")
    @classmethod
    def mirrored(cls, data: Any) -> Any:
        """A URL given as ``storage_path``, or recorded by another machine, is mirrored by this machine's own folder."""
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
        """Path or URL, as a user would give it."""
        return self.storage_url or str(self.storage_path)
