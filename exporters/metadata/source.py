"""What the exporters need of a model: its folder, configuration, tensor shapes and one tensor at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch


class ModelSource(Protocol):
    """A Hugging Face model folder; ``evaluators.model.folder.ModelFolder`` is one."""

    path: Path
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """What people call the model."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every stored tensor by Hugging Face name."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored type, on the CPU."""
