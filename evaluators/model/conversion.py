"""This module makes a model's parameters of a file's tensors, where the two are not the same.

transformers holds the experts of a layer as one parameter, and files hold them one by one; names differ too. Patterns
and operations are transformers' own (``transformers.conversion_mapping``). One parameter, or one expert's part of it
is made at a time, of the stored tensors that it needs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from evaluators.model.errors import ModelFolderError
from evaluators.model.experts import Slice, slices_of
from evaluators.model.outline import build_model, decoder_of, transposed_weights

USUAL = ("model.", "lm_head.")  # beginnings of the names of parameters where files hold them as they are
TEXT_PART = "language_model."  # in the names of a multimodal model, where the text model alone has nothing
EMBEDDING = "model.embed_tokens.weight"
EXPERTS = ".experts."  # in the names of their tensors, which some files stack


@dataclass(frozen=True)
class Made:
    """Says of which ``stored`` tensors a parameter is made, with transformers' ``converter`` if by more than a name."""

    stored: tuple[tuple[str, str], ...]  # pattern of the converter's input, and stored name
    converter: WeightConverter | None = None
    target: str = ""  # name of the converter's first output

    @property
    def names(self) -> list[str]:
        """Names of the stored tensors."""
        return [name for _, name in self.stored]

    def tensor(self, name: str, stored: Mapping[str, Tensor], model: PreTrainedModel) -> Tensor:
        """Return the parameter ``name``, made of ``stored`` tensors, all that it needs."""
        if self.converter is None:
            return stored[self.stored[0][1]]
        converter: Any = deepcopy(self.converter)
        for pattern, source in self.stored:
            converter.add_tensor(self.target, source, pattern, lambda source=source: stored[source])
        made = converter.convert(self.target, model=model, config=model.config)[name]
        found: Tensor = made[0] if isinstance(made, list) else made
        return found

    def only(self, start: int, stop: int) -> "Made | None":
        """Return how ``parameter[start:stop]`` is made; None where it takes all stored tensors."""
        if self.converter is None or not _stacks(self.converter.operations):
            return None
        by_pattern: dict[str, list[tuple[str, str]]] = {}
        for pattern, name in self.stored:
            by_pattern.setdefault(pattern, []).append((pattern, name))
        return replace(self, stored=tuple(pair for pairs in by_pattern.values() for pair in pairs[start:stop]))


def _stacks(operations: Sequence[object]) -> bool:
    first, *others = operations
    merges = isinstance(first, MergeModulelist) and first.dim == 0
    return merges and all(isinstance(other, Concatenate) and other.dim > 0 for other in others)


class Conversion:
    """Says how each parameter and stored buffer of a folder's text model is made of the folder's tensors.

    Other tensors, such as those of a vision tower or of a head for several tokens, are left out.
    """

    def __init__(self, path: Path, stored: Iterable[str]):
        self.model = build_model(path, apart=False)
        known = self.model.state_dict()
        names = {id(module): name for name, module in self.model.named_modules()}
        ends = [decoder_of(self.model), self.model.get_output_embeddings()]
        prefixes = tuple(f"{names[id(module)]}." for module in ends if module is not None)
        self.embedding = f"{names[id(self.model.get_input_embeddings())]}.weight"
        self.head = f"{names[id(ends[1])]}.weight"
        self._made = {n: m for n, m in _made_of(self.model, known, stored).items() if n.startswith(prefixes)}
        self._apart = {n: s for n, s in slices_of(self.model).items() if s.parameter in self._made}
        self._transposed = transposed_weights(self.model)
        stacked = {part.parameter for part in self._apart.values()}
        self.names = sorted([*self._apart, *(self._made.keys() - stacked)])
        self._shapes: dict[str, tuple[int, ...]] = {}  # of stacked parameters too

    def _source(self, name: str) -> tuple[str, Made, Slice | None, int]:
        """Return what the parameter ``name`` is read from: a parameter, how it is made, and the part and its place."""
        part = self._apart.get(name)
        if part is None:
            return name, self._made[name], None, 0
        made = self._made[part.parameter]
        one = made.only(part.expert, part.expert + 1)
        return (part.parameter, one, part, 0) if one else (part.parameter, made, part, part.expert)

    def stored_of(self, name: str) -> list[str]:
        """Return the names of the stored tensors that the parameter ``name`` is made of."""
        return self._source(name)[1].names

    def tensor(self, name: str, read: Callable[[list[str]], Mapping[str, Tensor]]) -> Tensor:
        """Return the parameter ``name``; ``read`` returns the stored tensors of a list of names."""
        parameter, made, part, place = self._source(name)
        found = made.tensor(parameter, read(made.names), self.model)
        if name in self._transposed:
            return found.mT.contiguous()
        return part.taken(found[place]) if part else found

    def shape(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Return the shape of the parameter ``name``, given those of stored tensors. Raises ModelFolderError."""
        part = self._apart.get(name)
        whole = part.parameter if part else name
        if whole not in self._shapes:
            self._shapes[whole] = self._shape(whole, shapes)
        if part is None:
            return self._shapes[name][::-1] if name in self._transposed else self._shapes[name]
        return tuple(part.taken(torch.empty(self._shapes[whole][1:], device="meta")).shape)

    def _shape(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        made = self._made[name]
        stored = {n: torch.empty(shapes[n], device="meta") for n in made.names}
        try:
            found = made.tensor(name, stored, self.model)
        except Exception as error:  # whatever an operation makes of tensors that do not fit
            reason = " ".join(str(error).split())
            raise ModelFolderError(
                f"expected the {len(stored)} tensors of {name} ({made.names[0]}, ...) to fit, found {reason}"
            ) from None
        return tuple(found.shape)


def is_plain(config: Mapping[str, Any], stored: Iterable[str]) -> bool:
    """Return whether a folder's tensors are known to be the model's parameters, so that nothing is to be converted."""
    names = list(stored)
    kinds = [str(config.get("model_type")), *map(str, config.get("architectures") or ())]
    mapped = any(get_checkpoint_conversion_mapping(kind) for kind in kinds)
    usual = EMBEDDING in names and all(n.startswith(USUAL) and EXPERTS not in n for n in names)
    return usual and not mapped and "text_config" not in config


def _made_of(model: PreTrainedModel, known: Mapping[str, Tensor], stored: Iterable[str]) -> dict[str, Made]:
    """Return how parameters are made of the tensors with the names ``stored``, as transformers matches them."""
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, Made] = {}
    alone = not any(TEXT_PART in name for name in known)
    for file_name in sorted(stored, key=dot_natural_key):
        name = file_name.replace(TEXT_PART, "", 1) if alone else file_name
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], model.base_model_prefix, known)
        if renamed in known and pattern is None:
            found.setdefault(renamed, Made(((name, file_name),)))
        elif renamed in known and pattern is not None:
            before = found.get(renamed, Made((), by_pattern[pattern], renamed))
            found[renamed] = replace(before, stored=(*before.stored, (pattern, file_name)))
    return found | _other_outputs(found, known)


def _other_outputs(found: Mapping[str, Made], known: Mapping[str, Tensor]) -> dict[str, Made]:
    """Return how the parameters are made that converters return beside their first ones."""
    others: dict[str, Made] = {}
    for name, made in found.items():
        targets = made.converter.target_patterns if made.converter is not None else []
        for target in targets[1:]:
            sibling = name.replace(targets[0], target)
            if sibling in known and sibling not in found:
                others[sibling] = made
    return others
