"""Finds the rows of a model that each matrix of a template holds, and proves that they are equal.

A GGUF tensor is rows along its inputs, and so is a weight of the model: each row of the template is looked up, by its
hash, among the rows of the model's tensors in the type that the template stores. One look-up finds tensors as they are,
rows of heads permuted, stacks of experts, slices of fused weights, and gates interleaved with what they gate.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from exporters.files.file_layout import Gather
from exporters.opening.source import GgufModel
from exporters.template.candidates import block_of, natural
from exporters.template.model_rows import ModelRows
from exporters.template.row_hashes import pairing, row_hashes

View = tuple[str, bool]  # a tensor of the model, and whether transposed


@dataclass(frozen=True)
class Found:
    """Holds the rows of each matrix that is explained, by GGUF name, and what is not: GGUF names, and the model's."""

    gathers: Mapping[str, Gather]
    transposed: frozenset[str]  # Hugging Face names whose columns are the rows
    unexplained: tuple[str, ...]
    partly: Mapping[str, str]  # Hugging Face names of which the template holds a part, and a tensor that holds some


def find_rows(
    template: GgufModel, rows: ModelRows, matrices: Sequence[str], named: Mapping[str, list[str]], names: Iterable[str]
) -> Found:
    """Return the rows of ``names``, tensors of the model, in each of the ``matrices`` of a template.

    ``named`` are candidates by GGUF name, which are tried before others of the same block.
    """
    hashes = {name: row_hashes(matrix_bytes(template, name)) for name in matrices}
    by_block = defaultdict(list)
    for name in sorted(names, key=natural):
        by_block[block_of(name)].append(name)
    sources: dict[str, list[View]] = {}
    for name in matrices:
        candidates = list(dict.fromkeys([*named.get(name, ()), *by_block[block_of(name)]]))
        if views := _sources(template, name, hashes[name], rows, named.get(name, ()), candidates):
            sources[name] = views
    gathers, partly = {}, {}
    for members in _clusters(sources):
        views = sorted({view for name in members for view in sources[name]}, key=lambda view: natural(view[0]))
        one_view_each = len({name for name, _ in views}) == len(views)
        kind = template.tensors[members[0]].type_name
        same_kind = all(template.tensors[name].type_name == kind for name in members)
        ours = np.concatenate([rows.hashes(*view, kind) for view in views])
        places = pairing(np.concatenate([hashes[name] for name in members]), ours)
        found = _split(members, hashes, views, rows, places) if places is not None else {}
        if one_view_each and same_kind and found and _equal(template, rows, found, dict(views), kind):
            gathers.update(found)
        else:
            partly.update({name: members[0] for name, _ in views})
    taken = {name for gather in gathers.values() for name in gather.names}
    transposed = frozenset(name for views in sources.values() for name, turned in views if turned and name in taken)
    return Found(gathers, transposed, tuple(name for name in matrices if name not in gathers), partly)


def matrix_bytes(template: GgufModel, name: str) -> np.ndarray:
    """Return the rows of a tensor as they are stored, uint8 (n, row_bytes)."""
    part = next(part for part in template.parts if name in part.tensors)
    size = part.tensors[name].size // int(np.prod(part.tensors[name].shape[:-1]))
    return part.read(name).reshape(-1, size)


def _sources(
    template: GgufModel,
    name: str,
    hashes: np.ndarray,
    rows: ModelRows,
    named: Sequence[str],
    candidates: Sequence[str],
) -> list[View]:
    """Return the tensors of the model that hold all rows of the template's tensor ``name``; none if there are none."""
    kind, columns = template.tensors[name].type_name, template.tensors[name].shape[-1]
    for turned in (False, True):  # as gguf's names say, in one piece
        views = [(source, turned) for source in named if rows.columns(source, turned) == columns]
        whole = bool(views) and sum(rows.count(*view) for view in views) == len(hashes)
        if whole and np.array_equal(np.concatenate([rows.hashes(*view, kind) for view in views]), hashes):
            return views
    for turned in (False, True):
        views = [(source, turned) for source in candidates if rows.columns(source, turned) == columns]
        held = {view: np.isin(hashes, rows.hashes(*view, kind)) for view in views}
        for view, rows_held in held.items():
            if rows_held.all():
                return [view]
        parts = [view for view, rows_held in held.items() if rows_held.any()]
        if parts and np.logical_or.reduce([held[view] for view in parts]).all():
            return parts
    return []


def _clusters(sources: Mapping[str, list[View]]) -> list[list[str]]:
    """Return the template's tensors in groups that share tensors of the model, each group in file order."""
    group: dict[str, set[str]] = {}
    by_view: dict[View, str] = {}
    for name, views in sources.items():
        group[name] = {name}
        for view in views:
            first = by_view.setdefault(view, name)
            if group[first] is not group[name]:
                merged = group[first] | group[name]
                for member in merged:
                    group[member] = merged
    order = {name: number for number, name in enumerate(sources)}
    unique = {id(members): members for members in group.values()}
    return [sorted(members, key=order.__getitem__) for members in unique.values()]


def _split(
    members: Sequence[str],
    hashes: Mapping[str, np.ndarray],
    views: Sequence[View],
    rows: ModelRows,
    places: np.ndarray,
) -> dict[str, Gather]:
    """Return the rows of each of ``members``, of which ``places`` says where all stand in the rows of all ``views``."""
    counts = [rows.count(*view) for view in views]
    starts, gathers, start = np.cumsum([0, *counts]), {}, 0
    for name in members:
        wanted = places[start : start + len(hashes[name])]
        start += len(wanted)
        used = np.unique(np.searchsorted(starts, wanted, side="right") - 1)
        moved, offset = np.empty(len(wanted), np.int32), 0
        for i in used:
            inside = (wanted >= starts[i]) & (wanted < starts[i + 1])
            moved[inside] = wanted[inside] - starts[i] + offset
            offset += counts[i]
        whole = offset == len(moved) and np.array_equal(moved, np.arange(offset))
        gathers[name] = Gather(tuple((views[i][0], counts[i]) for i in used), None if whole else moved)
    return gathers


def _equal(
    template: GgufModel, rows: ModelRows, gathers: Mapping[str, Gather], turned: Mapping[str, bool], kind: str
) -> bool:
    """Return whether each tensor of the template is, byte for byte, the rows that were found."""
    return all(
        np.array_equal(
            gather.collect(lambda source: rows.read(source, turned[source], kind)), matrix_bytes(template, name)
        )
        for name, gather in gathers.items()
    )
