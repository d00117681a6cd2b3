"""This module takes a mixture's stacked experts apart: each expert is linear layers of its own.

transformers keeps the experts of a layer in stacked parameters, and most files keep them by expert. Apart they are
matrices like any other: hooks see what an expert reads, and its weights are calibrated, rounded and placed alone.

Shapes: N positions, k experts of a position, D hidden size, I inner size.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

STACKED = "is_transposed"  # attribute that transformers' interface for experts gives to every module that stacks them

ROW_TILE = 32
NAME = re.compile(r"^(?P<mixture>.*\bexperts\.)(?P<expert>\d+)\.(?P<kind>.+)$")


class ExpertParts(NamedTuple):
    """The parts of the name of an expert's tensor."""

    mixture: str  # "model.layers.3.mlp.experts."
    expert: int
    kind: str  # "gate_proj.weight"


def expert_parts(name: str) -> ExpertParts | None:
    """Return the parts of the name of an expert's tensor, None for any other tensor."""
    found = NAME.match(name)
    return ExpertParts(found["mixture"], int(found["expert"]), found["kind"]) if found else None


class ExpertLinear(nn.Linear):
    """A linear layer whose output for a position does not depend on how many others chose the expert.

    Matrix libraries sum in another order where there are few rows, so on a CPU all products have ROW_TILE of them.
    """

    reads: Tensor | None = None  # positions (n,) among all N of what it is given next

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (n, rows) for inputs (n, columns)."""
        if x.device.type != "cpu":
            return super().forward(x)
        padded = nn.functional.pad(x, (0, 0, 0, -len(x) % ROW_TILE))
        return torch.cat([nn.functional.linear(tile, self.weight, self.bias) for tile in padded.split(ROW_TILE)])[
            : len(x)
        ]


class Expert(nn.Module):
    """Holds the linear layers of one expert under the names that files give them."""

    def __init__(self, hidden: int, inner: int, gated: bool, bias: bool):
        super().__init__()
        if gated:
            self.gate_proj = ExpertLinear(hidden, inner, bias)
        self.up_proj = ExpertLinear(hidden, inner, bias)
        self.down_proj = ExpertLinear(inner, hidden, bias)


class Experts(nn.ModuleList):
    """Computes what a module of stacked experts computes, one expert after the other, in their order."""

    def __init__(self, stacked: Any):
        gated, bias = bool(stacked.has_gate), bool(stacked.has_bias)
        count, *down = stacked.down_proj.shape
        inner, hidden = down if stacked.is_transposed else reversed(down)
        super().__init__(Expert(hidden, inner, gated, bias) for _ in range(count))
        self._gate = gate_of(stacked)

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum (N, D) of the outputs of the ``chosen`` experts (N, k) for ``hidden`` (N, D).

        ``weights`` (N, k) are the router's. An expert runs only if a position has chosen it.
        """
        total = torch.zeros_like(hidden)
        for index in chosen.unique().tolist():  # sorted
            if index >= len(self):  # of positions that choose fewer than k
                continue
            rows, places = torch.where(chosen == index)
            expert, x = self[index], hidden[rows]
            for linear in expert.children():
                linear.reads = rows
            gate = expert.gate_proj(x) if hasattr(expert, "gate_proj") else None
            output = expert.down_proj(self._gate(gate, expert.up_proj(x)))
            total.index_add_(0, rows, (output * weights[rows, places, None]).to(total.dtype))
        return total


@dataclass(frozen=True)
class Slice:
    """Says which part of a stacked ``parameter`` (experts, ...) is a tensor of one expert."""

    parameter: str
    expert: int
    transposed: bool  # whether the stack holds (columns, rows) of each expert
    rows: slice  # of the expert's matrix, or of its bias

    def taken(self, of_expert: Tensor) -> Tensor:
        """Return the tensor (rows, columns), or (rows,) of a bias, from what the stack holds of the expert."""
        return (of_expert.mT if self.transposed else of_expert)[self.rows].contiguous()


def slices_of(model: nn.Module) -> dict[str, Slice]:
    """Return where the tensors of experts are in the stacked parameters of ``model``, by their names once apart."""
    found: dict[str, Slice] = {}
    for path, module in model.named_modules():
        if hasattr(module, STACKED):
            found |= _slices(path, module)
    return found


def _slices(path: str, stacked: Any) -> dict[str, Slice]:
    whole = {kind: (kind, slice(None)) for kind in ("up_proj", "down_proj")}
    if stacked.has_gate:
        half = stacked.gate_up_proj.shape[1 if not stacked.is_transposed else 2] // 2
        rows = (slice(half), slice(half, None)) if stacked.is_concatenated else (slice(0, None, 2), slice(1, None, 2))
        whole |= {kind: ("gate_up_proj", part) for kind, part in zip(("gate_proj", "up_proj"), rows, strict=True)}
    found = {}
    for expert in range(len(stacked.down_proj)):
        for kind, (stack, part) in whole.items():
            found[f"{path}.{expert}.{kind}.weight"] = Slice(f"{path}.{stack}", expert, stacked.is_transposed, part)
            if stacked.has_bias:
                found[f"{path}.{expert}.{kind}.bias"] = Slice(f"{path}.{stack}_bias", expert, False, part)
    return found


def gate_of(stacked: Any) -> Callable[[Tensor | None, Tensor], Tensor]:
    """Return the function of gate (n, I), if there is one, and up (n, I) that is between the two products."""

    def gate_and_up(gate: Tensor | None, up: Tensor) -> Tensor:
        if gate is None:
            return cast(Tensor, stacked.act_fn(up))
        both = torch.cat([gate, up], -1) if stacked.is_concatenated else torch.stack([gate, up], -1).flatten(-2)
        return cast(Tensor, stacked._apply_gate(both))

    return gate_and_up


def take_apart(model: nn.Module) -> None:
    """Replace every module of stacked experts in ``model``, whose weights are on the meta device, by ``Experts``."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, STACKED):
                parent.register_module(name, Experts(child))
                for stack, _ in list(child.named_parameters(recurse=False)):
                    delattr(child, stack)  # its gate is still used
