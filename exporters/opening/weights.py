"""Says which GGUF tensors make each of a model's tensors, and reads them one at a time, by transformers' transforms.

transformers has two tables: of newer architectures chains of renamings and operations, of older ones a class that
undoes what llama.cpp's converter did.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations.gguf import GGUF_ARCHS, get_gguf_conversion_mapping
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from exporters.opening.experts import CHAINS
from exporters.opening.rotary import ROTARY_TENSORS
from exporters.opening.source import FLOATS, GgufModel, GgufModelError

STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HEAD = "lm_head.weight"

Read = Callable[[], Tensor]


@dataclass(frozen=True)
class OpenedTensor:
    """Describes a tensor of the folder: its shape and type there, and the GGUF tensors that it is made of."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[str, ...]
    transformed: Callable[[], Any]

    def read(self) -> Tensor:
        """Return the tensor. Raises GgufModelError where its shape or type does not hold it."""
        values = torch.as_tensor(self.transformed())
        if _without_ones(values.shape) == _without_ones(self.shape):
            values = values.reshape(self.shape)  # files have or leave out a dimension of one
        if tuple(values.shape) != self.shape:
            raise GgufModelError(
                f"expected {self.name} to be {self.shape} of {', '.join(self.sources)}, found {tuple(values.shape)}"
            )
        stored = values.to(self.dtype).contiguous()
        if not torch.equal(stored.float(), values.float()):
            raise GgufModelError(f"expected {self.name} to keep its values in {self.dtype}, found others")
        return stored


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def opened_tensors(model: GgufModel, config: PretrainedConfig) -> list[OpenedTensor]:
    """Return every tensor of the model, in the order of its modules; no weight is read.

    Tensors of floats keep their type; what is stored more coarsely, or in a vector, becomes float32, which holds it
    exactly. Raises GgufModelError for a GGUF tensor that transformers has no place for, for a missing one, and for one
    of another size.
    """
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop(HEAD, None)
    has_chain = model.architecture in GGUF_ARCHS or config.model_type in CHAINS
    sources, reader = (_by_operations if has_chain else _by_processor)(model, config, built)
    placed = {name for names in sources.values() for name in names}
    if left := [name for name in model.tensors if name not in placed and name not in ROTARY_TENSORS]:
        raise GgufModelError(
            f"expected the tensors of a {config.model_type} model, found {left[0]} in {model.path}, which transformers "
            "has no place for"
        )
    tensors = []
    for name, shape in shapes.items():
        found = tuple(sources.get(name, ()))
        stored = sum(prod(model.tensors[source].shape) for source in found)
        if not found or stored != prod(shape):
            what = "none" if not found else f"{stored:,} in {', '.join(found)}"
            raise GgufModelError(f"expected {prod(shape):,} weights of {name}, found {what} in {model.path}")
        kinds = {model.tensors[source].type_name for source in found}
        kind = kinds.pop() if len(kinds) == 1 and len(shape) > 1 else "F32"
        dtype = STORED[kind] if kind in FLOATS else torch.float32
        tensors.append(OpenedTensor(name, shape, dtype, found, reader(name, found)))
    return tensors


Sources = Mapping[str, list[str]]  # GGUF names by the name of the tensor that they make
Reader = Callable[[str, tuple[str, ...]], Callable[[], Any]]


def _by_processor(model: GgufModel, config: PretrainedConfig, built: PreTrainedModel) -> tuple[Sources, Reader]:
    """Return sources and reader of an architecture whose transforms are a class."""
    processor = TENSOR_PROCESSORS.get(model.architecture, TensorProcessor)(config=config.to_dict())
    # of all modules at once: for each of them the function would build llama.cpp's table of names again
    alone = SimpleNamespace(config=config, state_dict=built.state_dict, named_children=lambda: ())
    mapping = get_gguf_hf_weights_map(alone, processor)
    if not set(built.state_dict()) - {HEAD} <= set(mapping.values()):
        mapping = get_gguf_hf_weights_map(built, processor)
    sources = defaultdict(list)
    for name in model.tensors:
        target = mapping.get(name) or mapping.get(name.removesuffix(".weight"))
        if target is not None:
            sources[target].append(name)

    def reader(target: str, names: tuple[str, ...]) -> Callable[[], Any]:
        def read() -> Any:
            parsed: dict[str, dict[str, Tensor]] = {"tensors": {}}
            for name in names:
                result = processor.process(
                    weights=model.floats(name), name=name, tensor_key_mapping=mapping, parsed_parameters=parsed
                )
                if result.name is not None and target not in parsed["tensors"]:
                    return result.weights
            return parsed["tensors"][target]

        return read

    return sources, reader


def _by_operations(model: GgufModel, config: PretrainedConfig, built: PreTrainedModel) -> tuple[Sources, Reader]:
    """Return sources and reader of an architecture whose transforms are renamings and operations."""
    own = CHAINS.get(config.model_type)
    transforms = own(config) if own else get_gguf_conversion_mapping(model.architecture, config)
    renamings = [step for step in transforms if isinstance(step, WeightRenaming)]
    converters = [step for step in transforms if isinstance(step, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    sources, patterns = defaultdict(list), {}
    for name in model.tensors:
        target, pattern = rename_source_key(name, renamings, converters)
        patterns[name] = pattern
        sources[target].append(name)

    def reader(target: str, names: tuple[str, ...]) -> Callable[[], Any]:
        def read() -> Any:
            collected: Any = {patterns[name]: [torch.from_numpy(model.floats(name))] for name in names}
            converter = by_pattern.get(patterns[names[0]])
            if converter is None:
                return collected[None][0]
            collected = {pattern: collected[pattern] for pattern in converter.source_patterns if pattern in collected}
            for operation in converter.operations:
                collected = operation.convert(
                    collected,
                    source_patterns=converter.source_patterns,
                    target_patterns=converter.target_patterns,
                    full_layer_name=target,
                    model=built,
                    config=config,
                )
            (value,) = collected.values()
            return value[0] if isinstance(value, list) else value

        return read

    return sources, reader
