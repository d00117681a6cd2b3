"""Holds GGUF key-values with explicit types, in file order."""

from collections.abc import Sequence
from typing import Any

from gguf import GGUFValueType


class KeyValues(dict[str, tuple[Any, GGUFValueType]]):
    """Maps keys to (value, GGUF type). Arrays must not be empty: GGUF could not tell the type of their values."""

    def string(self, key: str, value: str) -> None:
        """Set a string."""
        self[key] = (value, GGUFValueType.STRING)

    def uint32(self, key: str, value: int) -> None:
        """Set an unsigned 32-bit integer."""
        self[key] = (value, GGUFValueType.UINT32)

    def uint64(self, key: str, value: int) -> None:
        """Set an unsigned 64-bit integer."""
        self[key] = (value, GGUFValueType.UINT64)

    def float32(self, key: str, value: float) -> None:
        """Set a 32-bit float."""
        self[key] = (value, GGUFValueType.FLOAT32)

    def boolean(self, key: str, value: bool) -> None:
        """Set a boolean."""
        self[key] = (value, GGUFValueType.BOOL)

    def array(self, key: str, values: Sequence[str] | Sequence[int] | Sequence[float]) -> None:
        """Set an array of strings, int32 or float32, by the type of its first value."""
        self[key] = (list(values), GGUFValueType.ARRAY)
