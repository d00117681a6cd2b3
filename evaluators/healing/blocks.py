"""Healing for models that do not fit in memory: trains each block towards the output of the full-precision block.

A block is trained on the output of the healed blocks before it, so it also corrects errors that they left. Between two
blocks the hidden states are in the checkpoint. Memory holds one block at a time, or embedding and head. Shapes: B
windows, T positions, D hidden size.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitgenome.common.devices import best_device
from evaluators.data.windows import TokenWindows, scored
from evaluators.engine.activations import EightBitInputs
from evaluators.engine.divergence import Reference
from evaluators.engine.evaluator import EvaluatorSetup, make_room
from evaluators.engine.weights import ModelWeights, embedded
from evaluators.healing.distillation import DistillationLoss
from evaluators.healing.scales import divided, multipliers, scale_gradients_of, scaled_weights
from evaluators.healing.tuner import (
    HealingCheckpoint,
    Tuner,
    micro_batches,
    repeatable_attention,
    schedule,
    tunable,
)
from evaluators.healing.whole import Healed
from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder
from evaluators.model.forward import BATCH_TOKENS, chunked
from evaluators.model.head import Head
from evaluators.prepare.bank import Bank
from evaluators.settings import HealingSettings
from quantizers.formats.table import QuantFormat
from search.types import Fidelity, Genome

CALIBRATION = "calibration"
FULL, PLAIN, HEALED = "full", "plain", "healed"  # full precision; quantized; quantized and healed so far

Tracks = dict[str, Tensor]  # "split/kind" -> hidden states (B, T, D) on the CPU, the input of the next block


def output_error(output: Tensor, target: Tensor, unscored: int = 0) -> Tensor:
    """Return the mean over positions of |output - target|^2 / |target|^2, scalar, for tensors (B, T, D).

    The first ``unscored`` positions of each window do not count.

    Errors are relative to each position's power because the RMS norm of the next block normalizes by it.
    """
    return position_errors(output, target, unscored).mean()


def position_errors(output: Tensor, target: Tensor, unscored: int) -> Tensor:
    """Return |output - target|^2 / |target|^2 (B, T - unscored) for tensors (B, T, D)."""
    output, target = scored(output, unscored), scored(target, unscored)
    return (output - target).square().sum(-1) / target.square().sum(-1)


@dataclass(frozen=True)
class HealBlock:
    """Pool task that heals one block or, with ``block`` after the last, the output norm, and then measures."""

    setup: EvaluatorSetup
    genome: Genome
    names: tuple[str, ...]  # Hugging Face names of the float32 tensors
    settings: HealingSettings
    checkpoint: HealingCheckpoint
    fidelities: tuple[Fidelity, ...]  # measured at the end
    block: int

    @property
    def label(self) -> str:
        return f"heal[block {self.block}]"

    @property
    def makes(self) -> tuple[Path, ...]:
        """Paths that the task writes."""
        return (self.checkpoint.path,)

    def run(self, state: dict[Any, Any]) -> dict[str, Healed]:
        """Return the divergences by split after the last block, else an empty dict."""
        make_room(state)  # a warm evaluator may hold the whole model
        stream = _Stream(self)
        with repeatable_attention(stream.device):
            if self.block == len(stream.model.blocks):
                return stream.finish()
            stream.heal_block(self.block)
            return {}


class _Stream:
    """Holds the model of one task, with only one part loaded, and the hidden states that this part reads."""

    def __init__(self, task: HealBlock):
        self.task = task
        self.device = best_device()
        self.folder = ModelFolder(task.setup.model)
        self.model = BlockModel(self.folder, self.device)
        self.bank = Bank(task.setup.bank)
        self.decoded: dict[str, QuantFormat | None] = {}  # tensors of ``model`` that are set to the genome's weights
        self.inputs = EightBitInputs(self.model, self.decoded) if task.setup.activations == "q8" else None
        self.formats = task.setup.space.formats_of(task.genome)
        windows = TokenWindows.load(task.setup.windows)
        self.unscored = windows.unscored
        self.ids = {f.split: torch.from_numpy(windows.take(f.split, f.tokens)) for f in task.fidelities}
        calibration = torch.from_numpy(windows.windows[CALIBRATION])
        self.schedule = schedule(task.settings, *calibration.shape)
        used, places = self.schedule.unique(return_inverse=True)
        self.ids[CALIBRATION], self.schedule = calibration[used], places  # only the windows that are trained on
        saved = task.checkpoint.load()
        self.values: dict[str, Tensor] = {}  # healed so far: float32 tensors, and multipliers of scales
        self.errors: list[list[float]] = []  # of each block's output, before and after its training
        self.done = 0
        self.found: dict[str, Healed] = {}  # once all is done
        if saved is None:
            self.tracks = self.embedded()
        else:
            tensors, record = saved
            self.tracks = {name: tensor for name, tensor in tensors.items() if "/" in name}
            self.values = {name: tensor for name, tensor in tensors.items() if "/" not in name}
            self.done, self.errors = record["blocks"], record["errors"]
            self.found = {split: Healed.from_json(found) for split, found in record.get("figures", {}).items()}

    def through(self, run: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Apply ``run`` to ``hidden`` (B, T, ...) on the device, chunk by chunk, and return the result on the CPU."""
        with torch.no_grad():
            return chunked(lambda rows: run(rows.to(self.device)).cpu(), hidden)

    def decode(self, model: BlockModel, names: Iterable[str]) -> None:
        """Set the loaded tensors ``names`` of ``model`` to the genome's weights."""
        for name in names:
            if name in self.formats:
                parameter = model.weight(name)
                parameter.data = self.bank.weights(name, self.formats[name], parameter.shape[-1], self.device)
                if model is self.model:
                    self.decoded[name] = self.formats[name]

    def embedded(self) -> Tracks:
        """Return the input of the first block for all splits and kinds."""
        weights = ModelWeights(self.model, self.bank, capacity=0)

        def states(formats: Mapping[str, QuantFormat], ids: Tensor) -> Tensor:
            at_once = max(1, BATCH_TOKENS // ids.shape[1])
            return torch.cat([rows.cpu() for rows in embedded(weights, formats, ids, at_once)])

        tracks = {f"{split}/{FULL}": states({}, ids) for split, ids in self.ids.items()}
        quantized = {split: states(self.formats, ids) for split, ids in self.ids.items()}
        tracks |= {f"{split}/{PLAIN}": hidden for split, hidden in quantized.items() if split != CALIBRATION}
        return tracks | {f"{split}/{HEALED}": hidden.clone() for split, hidden in quantized.items()}

    def advance(self, kind: str, run: Callable[[Tensor], Tensor]) -> None:
        """Replace the hidden states of one kind by ``run`` of them."""
        for name, hidden in self.tracks.items():
            if name.endswith(kind):
                self.tracks[name] = self.through(run, hidden)

    def heal_block(self, block: int) -> None:
        """Train one block and save its output; do nothing if the checkpoint is past the block."""
        if block < self.done:
            return
        model = self.model
        model.load_block(block)
        run = partial(model.run_block, block)
        self.advance(FULL, run)
        self.decode(model, [name for name, _ in model.linears(block)])
        self.advance(PLAIN, run)
        inputs, targets = self.tracks[f"{CALIBRATION}/{HEALED}"], self.tracks[f"{CALIBRATION}/{FULL}"]

        def loss_of(rows: Tensor) -> Tensor:
            return output_error(run(inputs[rows].to(self.device)), targets[rows].to(self.device), self.unscored)

        own = {name: model.weight(name).data for name in self.task.names if model.block_of(name) == block}
        packed = [name for name, _ in model.linears(block) if name in self.formats]
        with tunable(model, own) as parameters:
            before = self.error_of(run, inputs, targets)
            with self.scaled(self.tune(parameters, packed, loss_of)):
                self.advance(HEALED, run)
        healed = self.tracks[f"{CALIBRATION}/{HEALED}"]
        self.errors.append([before, self.error_of(lambda rows: rows, healed, targets)])
        self.save(block + 1)

    def error_of(self, run: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor) -> float:
        """Return the ``output_error`` of ``run`` on ``inputs`` (B, T, D), computed chunk by chunk."""
        step = max(1, BATCH_TOKENS // inputs.shape[1])
        with torch.no_grad():
            parts = [
                position_errors(run(rows.to(self.device)).cpu(), wanted, self.unscored)
                for rows, wanted in zip(inputs.split(step), targets.split(step), strict=True)
            ]
        return float(torch.cat(parts).mean())

    def tune(
        self, parameters: Mapping[str, nn.Parameter], packed: Sequence[str], loss_of: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Train ``parameters``, and the scales of the loaded tensors ``packed``, on the schedule.

        ``loss_of`` maps window indices (batch,) to their mean loss. Returns the multipliers of scales by name.
        """
        settings = self.task.settings
        ones = multipliers(self.bank, {name: self.formats[name] for name in packed}) if settings.scales else {}
        factors = {name: nn.Parameter(value.to(self.device)) for name, value in ones.items()}
        tuner = Tuner({**parameters, **factors}, settings)
        for rows in self.schedule:
            with self.scaled(factors) as gradients:
                for part in micro_batches(rows, self.ids[CALIBRATION].shape[1]):
                    (loss_of(part) * (len(part) / len(rows))).backward()
            for name, factor in factors.items():
                factor.grad = gradients[name].to(self.device)
            tuner.step()
        self.values |= tuner.values()
        return {name: factor.detach() for name, factor in factors.items()}

    @contextmanager
    def scaled(self, factors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Set loaded tensors to weights whose scales are multiplied by ``factors``; see ``scale_gradients_of``."""
        what = self.model, self.bank, self.formats, {n: f.detach() for n, f in divided(factors)[1].items()}
        with scaled_weights(*what), scale_gradients_of(*what) as gradients:
            yield gradients

    def save(self, done: int, **more: Any) -> None:
        """Save hidden states, tuned values and ``more``, which is JSON; ``done`` counts the finished parts."""
        record = {"blocks": done, "errors": self.errors, **more}
        self.task.checkpoint.save({**self.tracks, **self.values}, **record)

    def finish(self) -> dict[str, Healed]:
        """Train the output norm, and the scales of a head of its own, on the divergence itself.

        Saves all tuned values, and returns the figures by split. A head that is the embedding too keeps its scales.
        """
        if self.found:
            return self.found
        model, loss = self.model, DistillationLoss.of(self.task.settings)
        model.load_head()
        self.advance(FULL, model.norm)
        full_head = model.head
        self.decode(model, [model.head_name])
        head = model.head
        self.advance(PLAIN, model.norm)
        inputs, targets = self.tracks[f"{CALIBRATION}/{HEALED}"], self.tracks[f"{CALIBRATION}/{FULL}"]

        def loss_of(rows: Tensor) -> Tensor:
            ids = self.ids[CALIBRATION][rows].to(self.device)
            hidden = self.head_input(model.norm(inputs[rows].to(self.device)))
            quantized = model.head_with(model.weight(model.head_name))
            return loss(hidden, quantized, targets[rows].to(self.device), full_head, ids, self.unscored)

        own = {name: model.weight(name).data for name in self.task.names if name not in self.values}
        packed = [model.head_name] if model.head_name in self.formats and not self.folder.tied else []
        with tunable(model, own) as parameters:
            factors = self.tune(parameters, packed, loss_of)
            self.advance(HEALED, model.norm)
        with self.scaled(factors):
            heads = {FULL: full_head, PLAIN: head, HEALED: model.head}
            figures = {f.split: self.figures(f.split, heads) for f in self.task.fidelities}
        self.tracks = {}
        self.save(len(model.blocks) + 1, figures={split: asdict(found) for split, found in figures.items()})
        return figures

    def figures(self, split: str, heads: Mapping[str, Head]) -> Healed:
        """Return the divergences of the quantized and of the healed model on one split."""
        tracks = {kind: self.tracks[f"{split}/{kind}"].to(self.device) for kind in (FULL, PLAIN, HEALED)}
        reference = Reference(tracks[FULL], heads[FULL], self.ids[split], self.unscored)
        before, after = (
            partial(reference.compare, self.head_input(tracks[kind]), heads[kind]) for kind in (PLAIN, HEALED)
        )
        return Healed.measured(before, after)

    def head_input(self, hidden: Tensor) -> Tensor:
        """Return final hidden states (..., D) as the head reads them, rounded if its weight is quantized under q8."""
        return self.inputs.head_input(hidden) if self.inputs else hidden
