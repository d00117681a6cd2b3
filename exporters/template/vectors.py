"""Finds the norm or bias of a model behind each vector of a template that is stored in float32, by its values."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from exporters.files.file_layout import Gather
from exporters.metadata.source import ModelSource
from exporters.opening.source import GgufModel
from exporters.template.candidates import block_of, natural


@dataclass(frozen=True, eq=False)
class Vector:
    """Holds whose values a vector of the template has, and what was added to them."""

    gather: Gather
    added: float = 0.0


def find_vectors(
    template: GgufModel,
    source: ModelSource,
    vectors: Sequence[str],
    named: Mapping[str, list[str]],
    names: Iterable[str],
) -> dict[str, Vector]:
    """Return which of ``names``, vectors of the model, each of ``vectors`` of the template is, by GGUF name.

    ``named`` are candidates by GGUF name. Another vector of the block is taken only if it alone has the values, and if
    gguf's names say nothing else of it. One that is not found is left out.
    """
    found: dict[str, Vector] = {}
    for name in vectors:
        for candidate in named.get(name, ()):
            if vector := _same(template, source, name, candidate):
                found[name] = vector
    taken = {name for vector in found.values() for name in vector.gather.names}
    free = defaultdict(list)
    for name in sorted(names, key=natural):
        if name not in taken:
            free[block_of(name)].append(name)
    for name in vectors:
        if name not in found:
            equal = [vector for other in free[block_of(name)] if (vector := _same(template, source, name, other))]
            if len(equal) == 1:
                found[name] = equal[0]
    users = defaultdict(list)
    for name, vector in found.items():
        users[vector.gather.names[0]].append(name)
    return {name: vector for name, vector in found.items() if len(users[vector.gather.names[0]]) == 1}


def _same(template: GgufModel, source: ModelSource, name: str, candidate: str) -> Vector | None:
    """Return how the template's vector ``name`` is made of the model's ``candidate``, None if it is not."""
    if int(np.prod(template.tensors[name].shape)) != int(np.prod(source.shapes[candidate])):
        return None
    stored = torch.from_numpy(np.ascontiguousarray(template.floats(name))).reshape(-1)
    values = source.read(candidate).to(torch.float32).reshape(-1)
    sources = ((candidate, len(values)),)
    if torch.equal(stored, values):
        return Vector(Gather(sources))
    if torch.equal(stored, values + 1) or torch.equal(stored - 1, values):  # where the norm multiplies by 1 + weight
        return Vector(Gather(sources), 1.0)
    theirs, ours = stored.argsort(), values.argsort()
    if len(values.unique()) < len(values) or not torch.equal(stored[theirs], values[ours]):
        return None
    order = torch.empty_like(theirs)
    order[theirs] = ours  # a bias whose values follow the rows of its weight
    return Vector(Gather(sources, order.numpy().astype(np.int32)))
