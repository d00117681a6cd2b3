"""This module reads a safetensors file from beginning to end once, for all that is asked of its bytes and values."""

import hashlib
import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from bitgenome.common.remembered import Found

PIECE = 1 << 24  # values that are looked at together, while their bytes are in a processor's cache or near it
HEADER_LENGTH = 8  # bytes of the header's length, at the beginning of the file


def survey(file: Path) -> Found:
    """Return the ``sha256`` of a file, and the ``largest`` magnitude by tensor name: None where a value is not finite.

    Tensors of other types than floats are not in ``largest``. Raises SafetensorError or OSError for a file that cannot
    be read.
    """
    digest = hashlib.sha256()
    largest: dict[str, float | None] = {}
    with file.open("rb") as stream:
        length = stream.read(HEADER_LENGTH)
        digest.update(length)
        digest.update(stream.read(int.from_bytes(length, "little")))
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.offset_keys():  # in the order of the file, which has no gaps between tensors
            tensor = tensors.get_tensor(name).flatten()
            extremes = [_surveyed(piece, digest) for piece in tensor.split(PIECE)]
            if tensor.is_floating_point() and tensor.element_size() > 1:
                largest[name] = None if None in extremes else max(map(float, filter(None, extremes)), default=0.0)
    return {"sha256": digest.hexdigest(), "largest": largest}


def _surveyed(piece: Tensor, digest: "hashlib._Hash") -> float | None:
    """Add the bytes of ``piece`` (values,) to ``digest``; return its largest magnitude, None if one is not finite."""
    digest.update(piece.view(torch.uint8).numpy().data)
    if not piece.is_floating_point() or piece.element_size() == 1:  # PyTorch compares no 8-bit floats
        return 0.0
    low, high = (float(bound) for bound in piece.aminmax())
    largest = max(-low, high)
    return largest if math.isfinite(largest) else None
