"""This module keeps the output factor of a tensor in a file; evaluators.gradient.output_factors measures them."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitgenome.common.errors import UserError
from bitgenome.common.files import replacing
from bitgenome.common.tensor_files import holds_tensors


def factor_file(directory: Path, tensor: str) -> Path:
    """Return the path of a tensor's factor in ``directory``."""
    return directory / f"{tensor}.safetensors"


def tensor_of(path: Path) -> str:
    """Return the name of the tensor whose factor is in a file."""
    return path.name.removesuffix(".safetensors")


def save_factor(path: Path, factor: Tensor) -> None:
    """Write a factor (blocks, r, r) atomically."""
    with replacing(path) as temporary:
        save_file({"factor": factor.float().cpu().contiguous()}, temporary)


def load_factor(path: Path) -> Tensor:
    """Return the factor float32 (blocks, r, r) in a file. Raises UserError if it is missing or damaged."""
    try:
        return load_file(path)["factor"]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"expected an output factor in {path}, found {error}: the next attempt measures it") from None


def factor_readable(path: Path) -> bool:
    """Return whether the file of a factor exists and is complete."""
    return holds_tensors(path, ["factor"])
