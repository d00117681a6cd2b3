"""This module holds what takes the place of a model's modules while others are looked at, and fills their buffers."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evaluators.model.errors import ModelFolderError

SOME = 5
SOME_IDS = torch.arange(SOME, 0, -1)[None]  # token ids that are no positions


class Recorder(nn.Module):
    """Takes the place of a block: returns its input unchanged, and keeps what the last call gave it.

    The block's other attributes, such as its kind of attention, are the block's own.
    """

    def __init__(self, block: nn.Module, calls: list[Any], in_tuple: bool = False):
        super().__init__()
        self._block = (block,)  # in a tuple, so that its parameters are not this module's
        self._calls = calls
        self._in_tuple = in_tuple
        self.hidden: Tensor | None = None
        self.inputs: tuple[Any, ...] = ()  # positional ones, after the hidden states
        self.arguments: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattribute__("_block")[0], name)

    def forward(self, hidden: Tensor | None = None, *inputs: Any, **arguments: Any) -> Any:
        """Keep all arguments; return ``hidden``."""
        hidden = arguments.pop("hidden_states") if hidden is None else hidden
        self._calls.append(self)
        self.hidden, self.inputs, self.arguments = hidden, inputs, arguments
        return (hidden,) if self._in_tuple else hidden


class Stub(nn.Module):
    """Takes the place of a module with weights: returns NaN in the shape that the module would return."""

    def __init__(
        self, module: nn.Module, calls: list[Any], tables: list[Any], device: torch.device, dtype: torch.dtype
    ):
        super().__init__()
        self._module = (module,)
        self._calls, self._tables = calls, tables
        self._device, self._dtype = device, dtype

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattribute__("_module")[0], name)

    def forward(self, given: Tensor, *_: Any, **__: Any) -> Tensor:
        module = self._module[0]
        self._calls.append(module)
        how: dict[str, Any] = {"device": self._device, "dtype": self._dtype}
        if isinstance(module, nn.Embedding):
            if given.shape == (1, SOME) and torch.equal(given, SOME_IDS):
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
    fill_buffers(model, twin, device)
    return twin


@torch.no_grad()
def fill_buffers(model: PreTrainedModel, module: nn.Module, device: torch.device) -> None:
    """Give the buffers of ``module`` that no file holds, and that are on the meta device, transformers' values.

    Raises ModelFolderError for one that transformers does not initialize.
    """
    for name, part in module.named_modules():
        empty = {
            key: torch.full_like(buffer, _unset(buffer.dtype), device=device)
            for key, buffer in part.named_buffers(recurse=False)
            if buffer.is_meta and key in part._non_persistent_buffers_set
        }
        if not empty:
            continue
        for key, buffer in empty.items():
            part._buffers[key] = buffer
        for parameter in part.parameters(recurse=False):
            parameter._is_hf_initialized = True  # transformers' mark of what it leaves alone
        model._init_weights(part)
        for key in empty:
            value = part._buffers[key]
            if value.dtype != torch.bool and bool(
                (value.isnan() if value.is_floating_point() else value == _unset(value.dtype)).any()
            ):
                raise ModelFolderError(f"expected buffers that transformers initializes, found {name}.{key}")


def _unset(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return float("nan")
    return False if dtype == torch.bool else int(torch.iinfo(dtype).min)
