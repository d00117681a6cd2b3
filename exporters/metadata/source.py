"""Declares what the exporters need of a model: directory, configuration, tensor shapes, and one tensor at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch


class ModelSource(Protocol):
    """A Hugging Face model directory; ``evaluators.model.folder.ModelFolder`` implements it."""

    path: Path
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """Human-readable name of the model."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of all stored tensors by Hugging Face name."""

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in its stored dtype, on the CPU."""
