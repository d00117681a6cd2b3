"""This module holds what takes the place of a model's modules while others are looked at, and fills their buffers."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evaluators.model.errors import ModelFolderError

SOME = 5
SOME_IDS = torch.arange(SOME, 0, -1)[None]  # token ids that are no positions


class StandIn(nn.Module):
    """Takes the place of a module; attributes that it does not have are the module's own."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.of = (module,)  # in a tuple, so that its parameters are not this module's

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattribute__("of")[0], name)


class Unchanged(StandIn):
    """Returns what it is given."""

    def forward(self, given: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return ``given``."""
        return given


class Constant(StandIn):
    """Returns the same ``value`` whatever it is given."""

    def __init__(self, module: nn.Module, value: Tensor):
        super().__init__(module)
        self._value = value

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """Return the value."""
        return self._value


class Recorder(StandIn):
    """Takes the place of a block: returns its input unchanged, and keeps what the last call gave it.

    ``beside`` is the number of values that the block returns in a tuple after the hidden states; None for a block that
    returns these alone.
    """

    def __init__(self, block: nn.Module, calls: list[Any], beside: int | None = None):
        super().__init__(block)
        self._calls = calls
        self._beside = beside
        self.hidden: Tensor | None = None
        self.identity: tuple[Any, ...] = ()  # the same for the same values in the same memory
        self.inputs: tuple[Any, ...] = ()  # positional ones, after the hidden states
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden: Tensor | None = None, *inputs: Any, **arguments: Any) -> Any:
        """Keep all arguments; return ``hidden``."""
        hidden = arguments.pop("hidden_states") if hidden is None else hidden
        self._calls.append(self)
        self.hidden, self.inputs, self.arguments = hidden, inputs, arguments
        if isinstance(hidden, Tensor) and not hidden.is_inference():
            self.identity = hidden.data_ptr(), hidden.shape, hidden.stride(), hidden._version
        return hidden if self._beside is None else (hidden, *[hidden.new_full((), math.nan)] * self._beside)


class Stub(StandIn):
    """Takes the place of a module with weights: returns NaN in the shape that the module would return."""

    def __init__(
        self, module: nn.Module, calls: list[Any], tables: list[Any], device: torch.device, dtype: torch.dtype
    ):
        super().__init__(module)
        self._calls, self._tables = calls, tables
        self._device, self._dtype = device, dtype

    def forward(self, given: Tensor, *_: Any, **__: Any) -> Tensor:
        (module,) = self.of
        self._calls.append(module)
        how: dict[str, Any] = {"device": self._device, "dtype": self._dtype}
        if isinstance(module, nn.Embedding):
            if given.shape == (1, SOME) and (given.is_meta or torch.equal(given, SOME_IDS)):
                self._tables.append(module)
            return torch.full((*given.shape, module.embedding_dim), math.nan, **how)
        if isinstance(module, nn.Linear):
            return torch.full(
                (*given.shape[:-1], module.out_features), math.nan, device=self._device, dtype=self._dtype
            )
        return given


def of_weights(value: Any) -> bool:
    """Return whether what a block was given has values that come from weights, which stand-ins make NaN."""
    if isinstance(value, Mapping):
        return any(map(of_weights, value.values()))
    if isinstance(value, tuple | list):
        return any(map(of_weights, value))
    return isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any())


def replaced(parent: nn.Module, children: Mapping[str, nn.Module]) -> nn.Module:
    """Return a shallow copy of ``parent`` with other ``children`` by name; the rest is shared with ``parent``."""
    twin = copy.copy(parent)
    twin._modules = {**parent._modules, **children}
    twin._forward_hooks, twin._forward_pre_hooks = type(parent._forward_hooks)(), type(parent._forward_pre_hooks)()
    return twin


def fresh(model: PreTrainedModel, module: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of ``module``, which has no weights, with its buffers as transformers initializes them."""
    twin = copy.deepcopy(module)
    fill_buffers(model, [twin], device)
    return twin


@torch.no_grad()
def fill_buffers(model: PreTrainedModel, modules: Sequence[nn.Module], device: torch.device) -> None:
    """Give the buffers of ``modules`` that no file holds, and that are on the meta device, transformers' values.

    Raises ModelFolderError for one that transformers does not initialize.
    """
    filled: list[tuple[nn.Module, str]] = []
    for part in (part for module in modules for part in module.modules()):
        empty = [
            key
            for key, buffer in part.named_buffers(recurse=False)
            if buffer.is_meta and key in part._non_persistent_buffers_set
        ]
        for key in empty:
            buffer = part.get_buffer(key)
            nothing = math.nan if buffer.is_floating_point() else 0
            part._buffers[key] = torch.full_like(buffer, nothing, device=device)
        if empty:
            _initialize(model, part)
        filled += ((part, key) for key in empty)
    if any(map(_unset, filled)):  # Falcon H1's are filled for all blocks at once
        _initialize(model, model)
    if unset := next(filter(_unset, filled), None):
        raise ModelFolderError(
            f"expected buffers that transformers initializes, found {unset[1]} of {type(unset[0]).__name__}"
        )


def _initialize(model: PreTrainedModel, module: nn.Module) -> None:
    for tensor in (*module.parameters(recurse=False),):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined] # transformers' mark of what it leaves alone
    model._init_weights(module)


def _unset(found: tuple[nn.Module, str]) -> bool:
    value = found[0].get_buffer(found[1])
    return value.is_floating_point() and bool(value.isnan().any())
