"""Looks into safetensors files without reading their tensors."""

from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open


def holds_tensors(path: Path, names: Iterable[str]) -> bool:
    """Return whether the safetensors file ``path`` exists, is complete and holds all tensors ``names``."""
    try:
        with safe_open(path, framework="pt") as file:
            return set(names) <= set(file.keys())
    except (OSError, SafetensorError):
        return False
