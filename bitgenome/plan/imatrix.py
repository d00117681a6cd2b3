"""Reads the importance matrix that a configuration names, and checks that it is one of the model's."""

from collections.abc import Iterable

import numpy as np

from bitgenome.common.digests import digest_of_file
from bitgenome.common.errors import UserError
from bitgenome.config.quantization import QuantizationConfig
from exporters.files.file_layout import FileLayout
from exporters.files.imatrix import read_imatrix

BLOCK = "blk."  # begins the GGUF names of the tensors that llama-imatrix measures


def imatrix_digest(config: QuantizationConfig) -> str | None:
    """Return the digest of the configured file, None if there is none."""
    return digest_of_file(config.imatrix) if config.imatrix else None


def imatrix_importance(config: QuantizationConfig, file: FileLayout, tensors: Iterable[str]) -> dict[str, np.ndarray]:
    """Return the mean squares float32 (columns,) of the inputs of the blocks' ``tensors``, by Hugging Face name.

    ``file`` is what the run's file will hold. Embedding and head are left out, as llama-imatrix leaves them out.
    Nothing without a configured file. Raises UserError for one that is missing, has another form, or is that of another
    model.
    """
    path = config.imatrix
    if path is None:
        return {}
    if not path.is_file():
        raise UserError(f"expected a file for quantization.imatrix, found nothing at {path}")
    stored, found = read_imatrix(path), {}
    stacks = {t.name: t.gather.names for t in file.searched if t.gather and len(t.gather.names) > 1}  # of experts
    for tensor in tensors:
        if not (name := file.names[tensor][0]).startswith(BLOCK):
            continue
        if name not in stored:
            known = next(iter(stored), "none")
            raise UserError(
                f"expected the importance of {name} in {path}, found none: it has {len(stored)}, as {known}"
            )
        values, columns, members = stored[name], file.shapes[tensor][1], stacks.get(name, (tensor,))
        if values.shape != (len(members), columns):
            each = f"{len(members)} x {columns}" if len(members) > 1 else f"{columns}"
            raise UserError(
                f"expected the importance of {each} columns of {name} in {path}, found {values.shape[0]} x "
                f"{values.shape[1]}: is it that of another model?"
            )
        found[tensor] = values[members.index(tensor)]
    return found
