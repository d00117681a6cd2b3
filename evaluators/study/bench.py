"""Measures one method of a study on held-out text: treats every layer, with one block in memory at a time."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitgenome.common.devices import best_device
from evaluators.data.windows import TokenWindows
from evaluators.engine.divergence import Reference
from evaluators.engine.evaluator import make_room
from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder
from evaluators.model.forward import chunked
from evaluators.model.head import Head
from evaluators.prepare.activation_samples import sampled_input
from evaluators.prepare.bank import group_tensors
from evaluators.prepare.input_group import InputGroup, group_file
from evaluators.study.layer import LayerInput, LayerRecord, StudyLayer, record_of
from evaluators.study.methods import Method
from search.types import Fidelity


@dataclass(frozen=True)
class StudySetup:
    """Everything a worker needs to measure methods of one study."""

    model: Path
    calibration: Path  # directory of the input groups
    groups: tuple[str, ...]
    windows: Path  # file of TokenWindows
    fidelity: Fidelity
    damping: float
    whole_model: bool  # whether embedding and head are treated too
    samples: Path | None  # directory of activation samples, if a method needs them
    key: str  # digest of the above


@dataclass(frozen=True)
class MethodResult:
    """Quality and cost of one method on held-out text; bits are per weight, ``kl`` is in nats per token."""

    method: dict[str, Any]
    line: str
    label: str
    average_bits: float  # of the treated tensors, without scales and zeros
    stored_bits: float  # with scales and zeros
    kl: float
    perplexity: float
    full_perplexity: float  # of the full-precision model
    reconstruction: float  # sum of tr(dW H dW^T) over sum of tr(W H W^T)
    sparsity: float  # share of weights that are exactly 0
    seconds: float
    grouping_seconds: float  # for mutual information and clusters, as if nothing were cached
    layers: tuple[LayerRecord, ...]

    def to_json(self) -> dict[str, Any]:
        """Return all fields as a JSON object, layers included."""
        return asdict(self)


class MethodBench:
    """Holds the full-precision reference of a study, and measures the model with any method's weights against it."""

    def __init__(self, setup: StudySetup):
        self.setup = setup
        self.model = BlockModel(ModelFolder(setup.model), best_device())
        windows = TokenWindows.load(setup.windows)
        self.ids = torch.from_numpy(windows.take(setup.fidelity.split, setup.fidelity.tokens))
        self.groups: dict[int, list[Path]] = {}
        for name in setup.groups:
            file = group_file(setup.calibration, name)
            self.groups.setdefault(self.model.block_of(group_tensors(file)[0]), []).append(file)
        hidden, head = self._run(lambda block: None)
        self.reference = Reference(hidden, head, self.ids, windows.unscored)
        self.full_perplexity = self.reference.compare(hidden, head).perplexity

    @torch.inference_mode()
    def _run(self, treat: Callable[[int], None]) -> tuple[Tensor, Head]:
        """Return final hidden states (B, T, D) and head; ``treat`` is called with the index of each loaded block.

        The embedding has index -1, final norm and head the number of blocks.
        """
        self.model.load_ends()
        for end in (-1, len(self.model.blocks)):
            treat(end)
        hidden = chunked(self.model.embed, self.ids)
        for block in range(len(self.model.blocks)):
            self.model.load_block(block)
            treat(block)
            hidden = chunked(partial(self.model.run_block, block), hidden)
            self.model.unload_block(block)
        return chunked(self.model.norm, hidden), self.model.head

    def measure(self, method: Method) -> MethodResult:
        """Return the figures of ``method``. Raises FloatingPointError if weights or logits are not finite."""
        started = time.perf_counter()
        records: list[LayerRecord] = []
        hidden, head = self._run(partial(self._treat, method, records))
        measured = self.reference.compare(hidden, head)
        weights = sum(r.weights for r in records)
        return MethodResult(
            method=method.model_dump(mode="json"),
            line=method.line,
            label=method.label,
            average_bits=sum(r.average_bits * r.weights for r in records) / weights,
            stored_bits=sum(r.stored_bits * r.weights for r in records) / weights,
            kl=measured.kl,
            perplexity=measured.perplexity,
            full_perplexity=self.full_perplexity,
            reconstruction=sum(r.error for r in records) / sum(r.power for r in records),
            sparsity=sum(r.zeros for r in records) / weights,
            seconds=time.perf_counter() - started,
            grouping_seconds=sum(r.grouping_seconds for r in records),
            layers=tuple(records),
        )

    def _treat(self, method: Method, records: list[LayerRecord], block: int) -> None:
        """Replace the weights of a loaded block, or of embedding or head, and add a record of each to ``records``."""
        blocks = len(self.model.blocks)
        if not (self.setup.whole_model or 0 <= block < blocks):
            return
        for file in self.groups.get(block, ()):
            group = InputGroup.load(file)
            wanted = self.setup.samples if method.needs_samples else None
            samples = None if wanted is None else sampled_input(wanted, group.name)
            shared = LayerInput(group, self.setup.damping, self.model.device, samples)
            for name in group.tensors:
                parameter = self.model.weight(name)
                layer = StudyLayer(name, block, blocks, parameter.data, shared)
                treated = method.treat(layer)
                records.append(record_of(layer, treated))
                parameter.data = treated.weights


@dataclass(frozen=True)
class MeasureMethod:
    """Pool task that measures one method."""

    setup: StudySetup
    method: Method

    @property
    def label(self) -> str:
        return f"study[{self.method.label}]"

    def run(self, state: dict[Any, Any]) -> MethodResult:
        """Return the figures; ``state`` keeps the bench for the worker's next method of this study."""
        if self.setup.key not in state:
            make_room(state)
            state[self.setup.key] = MethodBench(self.setup)
        bench: MethodBench = state[self.setup.key]
        return bench.measure(self.method)
