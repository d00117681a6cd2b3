"""Chooses the type of matrices that are not searched, where the one that a template has loses values of the model."""

from math import prod

import torch

from exporters.files.file_layout import TORCH_TYPES, FileTensor, Gather
from exporters.metadata.source import ModelSource
from exporters.opening.source import StoredTensor

SMALL = 1 << 16  # weights, of which a file may have twice the bytes
# llama.cpp rounds the inputs of a matrix in BF16 to BF16, to 2^-9 of themselves, and those of one in F16 to 2^-12. A
# DBRX of BF16 weights, of which F16 loses the 3 in 10,000 below 8e-6, with experts in BF16: KL .0018 to the simulation
# instead of .0004.
MOST_LOST = 2.0**-9  # of the root of the mean square


def kept_tensor(tensor: StoredTensor, gather: Gather, transposed: bool, source: ModelSource) -> FileTensor:
    """Return how a tensor that is the rows of ``gather``, and is not searched, is stored.

    It is copied where its type holds all values of the model. If not, it is made of these: in F32 if it is small, in
    BF16 if the template's type loses more than rounding its inputs to BF16 does.
    """
    kind, lost = tensor.type_name, _lost(tensor.type_name, gather, source)
    if lost > 0 and prod(tensor.shape) <= SMALL:
        kind = "F32"
    elif lost > MOST_LOST and _lost("BF16", gather, source) < lost:
        kind = "BF16"
    if kind == tensor.type_name:
        return FileTensor(tensor.name, tensor.shape, type_name=kind)
    return FileTensor(tensor.name, tensor.shape, gather, type_name=kind, retyped=True, transposed=transposed)


def _lost(kind: str, gather: Gather, source: ModelSource) -> float:
    """Return the error of the model's values in type ``kind``, relative to them; infinite where it has them so."""
    error = total = 0.0
    for name in gather.names:
        values = source.read(name).float()
        error += float((values.to(TORCH_TYPES[kind]).float() - values).square().sum(dtype=torch.float64))
        total += float(values.square().sum(dtype=torch.float64))
    return (error / total) ** 0.5 if error else 0.0
