"""GGUF key-values with explicit types, in the order in which the file lists them."""

from collections.abc import Sequence
from typing import Any

from gguf import GGUFValueType


class KeyValues(dict[str, tuple[Any, GGUFValueType]]):
    """Key -> (value, GGUF type). Arrays must not be empty: GGUF cannot type them."""

    def string(self, key: str, value: str) -> None:
        self[key] = (value, GGUFValueType.STRING)

    def uint32(self, key: str, value: int) -> None:
        self[key] = (value, GGUFValueType.UINT32)

    def uint64(self, key: str, value: int) -> None:
        self[key] = (value, GGUFValueType.UINT64)

    def float32(self, key: str, value: float) -> None:
        self[key] = (value, GGUFValueType.FLOAT32)

    def boolean(self, key: str, value: bool) -> None:
        self[key] = (value, GGUFValueType.BOOL)

    def array(self, key: str, values: Sequence[str] | Sequence[int] | Sequence[float]) -> None:
        """Strings, int32 or float32 by the type of the first value."""
        self[key] = (list(values), GGUFValueType.ARRAY)
