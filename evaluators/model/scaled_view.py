"""A scaled view is a model folder whose weights are those of another folder times factors of rows and columns.

The folder holds config.json, the tokenizer, ``scaling.safetensors`` with vectors ``<tensor>:rows`` and
``<tensor>:columns``, and ``scaled_view.json``, which names the folder of the weights. Weights are multiplied when they
are read, so a view takes only the disk space of its vectors, whatever the model's size.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import safe_open, save
from torch import Tensor

from bitgenome.common import layout
from bitgenome.common.files import atomic_write_bytes, atomic_write_json
from bitgenome.common.json_files import read_json_object

ROWS, COLUMNS = ":rows", ":columns"
COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt")  # configuration and tokenizer
WEIGHTS_INDEX = ".safetensors.index.json"


def write_scaled_view(directory: Path, source: Path, factors: Mapping[str, Tensor]) -> None:
    """Write a scaled view of the model folder ``source`` to ``directory``, which is created if need be.

    ``factors`` maps ``<tensor>:rows`` to vectors (rows,) and ``<tensor>:columns`` to vectors (columns,), stored as
    float32. ``scaled_view.json`` is written last.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in COPIED_SUFFIXES and not file.name.endswith(WEIGHTS_INDEX):
            shutil.copyfile(file, directory / file.name)
    vectors = {key: vector.float().cpu().clone() for key, vector in factors.items()}
    atomic_write_bytes(directory / layout.SCALING_FACTORS, save(vectors))
    atomic_write_json(directory / layout.SCALED_VIEW, {"weights": str(source.resolve())})


def source_of(folder: Path) -> Path | None:
    """Return the folder whose weights the scaled view ``folder`` reads; None if ``folder`` is no scaled view."""
    file = folder / layout.SCALED_VIEW
    return Path(read_json_object(file)["weights"]) if file.is_file() else None


def scaled(folder: Path, name: str, tensor: Tensor) -> Tensor:
    """Return ``tensor`` times the factors that the scaled view ``folder`` has for ``name``.

    The result is float32 if there are any factors, else ``tensor`` itself.
    """
    with safe_open(folder / layout.SCALING_FACTORS, framework="pt") as factors:
        keys = factors.keys()
        for key in (name + ROWS, name + COLUMNS):
            if key in keys:
                factor = factors.get_tensor(key)
                by_row = key.endswith(ROWS) and tensor.ndim == 2
                tensor = tensor.to(torch.float32) * (factor[:, None] if by_row else factor)
    return tensor
