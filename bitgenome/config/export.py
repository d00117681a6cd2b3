"""Settings of the files that a run leaves; they never change what it finds."""

from typing import Any

from pydantic import Field, field_validator

from bitgenome.common.section import Section
from search.budget import parse_size


class ExportConfig(Section):
    """Settings of the file that is exported."""

    split_max_size: int | None = Field(
        None,
        gt=0,
        description="the file is also written in llama.cpp's shards, whose tensors take at most this, such as 4GB, and "
        "the proof runs these",
    )

    @field_validator("split_max_size", mode="before")
    @classmethod
    def in_bytes(cls, value: Any) -> Any:
        """Return a size such as "4GB", or llama.cpp's "4G", in bytes."""
        return shard_size(value) if isinstance(value, str) else value


def shard_size(given: str) -> int:
    """Return a size such as 4GB, or llama.cpp's 4G, in bytes. Raises ValueError for what is no size above 0."""
    size = parse_size(f"{given}B" if given[-1:].upper() in ("M", "G") else given)
    if size <= 0:
        raise ValueError(f"expected a size above 0, found {given}")
    return size
