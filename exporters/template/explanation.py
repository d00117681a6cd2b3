"""Finds and proves what of a model stands behind each tensor of a template, and which tensors may be searched."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from exporters.files.file_layout import TORCH_TYPES, FileTensor, Gather
from exporters.metadata.source import ModelSource
from exporters.opening.source import FLOATS, GgufModel, StoredTensor
from exporters.template.candidates import may_be_quantized, named
from exporters.template.checks import TemplateError
from exporters.template.kept import kept_tensor
from exporters.template.matrices import Found, find_rows
from exporters.template.model_rows import ModelRows
from exporters.template.vectors import Vector, find_vectors

EMBEDDING = "token_embd.weight"
PADDED_ROWS = 16  # of which every type's bytes need no padding


@dataclass(frozen=True)
class Explanation:
    """Holds a template's tensors in file order, and which of the model's are not searched or not healed, and why."""

    tensors: tuple[FileTensor, ...]
    refused: Mapping[str, str]  # by Hugging Face name: a sentence
    unhealed: tuple[str, ...]  # Hugging Face names of vectors that are not found
    left_out: frozenset[str] = frozenset()  # Hugging Face names of searchable matrices that are not searched


def explain(template: GgufModel, source: ModelSource, searchable: Callable[[str], bool]) -> Explanation:
    """Return what of ``source`` stands behind each tensor of ``template``.

    ``searchable`` says which of the model's matrices, by Hugging Face name, may be searched. Tensors are read twice,
    one in memory at a time. Raises TemplateError if the template has other values than the model.
    """
    blocks = int(template.hyperparameters().get("block_count", 0))
    names = named(source.shapes, template.architecture, blocks)
    model_matrices = [name for name, shape in source.shapes.items() if len(shape) > 1]
    stored = template.tensors.values()
    matrices = [tensor.name for tensor in stored if tensor.type_name in FLOATS and len(tensor.shape) > 1]
    vectors = [t.name for t in stored if t.type_name == "F32" and prod(t.shape[:-1]) == 1]
    by_matrix = {name: [n for n in found if n in set(model_matrices)] for name, found in names.items()}
    rows = ModelRows(source)
    found = find_rows(template, rows, matrices, by_matrix, model_matrices)
    _check_values(template, source, found, by_matrix)
    model_vectors = [name for name, shape in source.shapes.items() if len(shape) == 1]
    by_vector = {name: [n for n in found_names if n in set(model_vectors)] for name, found_names in names.items()}
    floats = find_vectors(template, source, vectors, by_vector, model_vectors)
    searched, refused = _searched(template, found, searchable, model_matrices)
    healed = {name for vector in floats.values() for name in vector.gather.names}
    return Explanation(
        tuple(_file_tensor(tensor, found, floats, searched, source) for tensor in stored),
        refused,
        tuple(name for name in model_vectors if name not in healed),
        _left_out(found.gathers, searched, filter(searchable, model_matrices)),
    )


def expected_of(template: GgufModel, source: ModelSource, searchable: Callable[[str], bool]) -> Explanation:
    """Return what names and shapes let one expect of ``explain``, without a weight of ``source``.

    Sizes are those of the file wherever gguf's names say which tensors stand behind those that may be quantized.
    """
    names = named(source.shapes, template.architecture, int(template.hyperparameters().get("block_count", 0)))
    tensors = []
    for tensor in template.tensors.values():
        sources = names.get(tensor.name, [])
        same = bool(sources) and sum(prod(source.shapes[name]) for name in sources) == prod(tensor.shape)
        searched = same and _is_weight(tensor) and all(map(searchable, sources))
        columns = tensor.shape[-1] if len(tensor.shape) > 1 else 1
        gather = Gather(tuple((name, prod(source.shapes[name]) // columns) for name in sources))
        healed = same and len(tensor.shape) == 1 and tensor.type_name == "F32"
        kept = gather if searched or healed else None
        tensors.append(FileTensor(tensor.name, tensor.shape, kept, searched, tensor.type_name))
    gathers = {tensor.name: tensor.gather for tensor in tensors if tensor.gather}
    searched_names = {tensor.name for tensor in tensors if tensor.searched}
    matrices = filter(searchable, source.shapes)
    return Explanation(tuple(tensors), {}, (), _left_out(gathers, searched_names, matrices))


def _left_out(gathers: Mapping[str, Gather], searched: set[str], matrices: Iterable[str]) -> frozenset[str]:
    return frozenset(matrices) - {name for holder in searched for name in gathers[holder].names}


def _is_weight(tensor: StoredTensor) -> bool:
    return may_be_quantized(tensor.name, tensor.shape)


def _searched(
    template: GgufModel, found: Found, searchable: Callable[[str], bool], matrices: list[str]
) -> tuple[set[str], dict[str, str]]:
    """Return the GGUF names of the searched tensors, and why tensors of the model that might be searched are not."""
    holders: dict[str, list[str]] = {}
    for name, gather in found.gathers.items():
        for source in gather.names:
            holders.setdefault(source, []).append(name)
    halves = any(t.type_name != "F32" for t in template.tensors.values() if _is_weight(t))
    kept = {n for n in found.gathers if halves and template.tensors[n].type_name == "F32"}
    refused = {}
    for name in filter(searchable, matrices):
        if name in found.partly:
            refused[name] = f"{found.partly[name]} of the template holds a part of its rows, and nothing the rest"
        elif name in found.transposed:
            refused[name] = f"its columns are the rows of {holders[name][0]} of the template"
        elif name in holders and not all(_is_weight(template.tensors[holder]) for holder in holders[name]):
            continue  # llama.cpp keeps it in floats
        elif name not in holders:
            refused[name] = "no tensor of the template holds its rows"
        elif len(holders[name]) > 1 and any(_rows(template, holder) % PADDED_ROWS for holder in holders[name]):
            refused[name] = f"the template holds it in {len(holders[name])} tensors, which are padded"
        elif any(
            len(sources) > 1 and dict(sources)[name] % PADDED_ROWS
            for sources in (found.gathers[holder].sources for holder in holders[name])
        ):
            refused[name] = f"{holders[name][0]} of the template is padded as a whole, its parts are not"
    searched = {
        name
        for name, gather in found.gathers.items()
        if _is_weight(template.tensors[name])
        and name not in kept
        and all(searchable(source) and source not in refused for source in gather.names)
    }
    while open_ends := {n for n in searched if any(set(holders[s]) - searched for s in found.gathers[n].names)}:
        searched -= open_ends
    return searched, refused


def _rows(template: GgufModel, name: str) -> int:
    return prod(template.tensors[name].shape[:-1])


def _file_tensor(
    tensor: StoredTensor, found: Found, floats: Mapping[str, Vector], searched: set[str], source: ModelSource
) -> FileTensor:
    if tensor.name in searched:
        return FileTensor(tensor.name, tensor.shape, found.gathers[tensor.name], True, tensor.type_name)
    if vector := floats.get(tensor.name):
        return FileTensor(tensor.name, tensor.shape, vector.gather, added=vector.added)
    gather = found.gathers.get(tensor.name)
    turned = {name in found.transposed for name in gather.names} if gather else set()
    if gather and len(turned) == 1:
        return kept_tensor(tensor, gather, turned.pop(), source)
    return FileTensor(tensor.name, tensor.shape, type_name=tensor.type_name)


def _check_values(template: GgufModel, source: ModelSource, found: Found, named: Mapping[str, list[str]]) -> None:
    """Raise TemplateError if a tensor has other values than the tensor of the model that it is named after.

    Values in another order are left to copying: that of columns does not commute with quantization.
    """
    for name in found.unexplained:
        sources = named.get(name, [])
        if len(sources) != 1 or prod(source.shapes[sources[0]]) != prod(template.tensors[name].shape):
            if name == EMBEDDING and sources:
                raise TemplateError(
                    f"expected a template with the model's vocabulary, {sources[0]} {source.shapes[sources[0]]}, found "
                    f"{name} {template.tensors[name].shape} in {template.path}"
                )
            continue
        theirs, kind = np.sort(template.floats(name).ravel()), TORCH_TYPES[template.tensors[name].type_name]
        ours = source.read(sources[0]).float().to(kind).float().ravel().sort().values.numpy()
        if not np.array_equal(theirs, ours):
            raise TemplateError(
                f"expected a template of this model, found {name} to have other values than {sources[0]}, in "
                f"{template.path}"
            )
    if EMBEDDING not in found.gathers:
        raise TemplateError(f"expected a template of this model, found other rows in {EMBEDDING} of {template.path}")
