"""Healing with the whole model in memory: tunes float32 tensors (norms, biases) and block scales by distillation.

Integers of packed tensors stay as they are. Workers compute the gradients of parts of each step's windows, and the
driver takes the steps. Shapes: n windows, T positions, D hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitgenome.common.devices import best_device
from evaluators.data.windows import TokenWindows
from evaluators.engine.divergence import Divergence, Reference
from evaluators.engine.evaluator import EvaluatorSetup, warm
from evaluators.healing.distillation import DistillationLoss
from evaluators.healing.quantized_model import NO_FACTORS, SimulatedModel
from evaluators.healing.scales import divided, scale_gradients_of
from evaluators.healing.tuner import (
    HealingCheckpoint,
    Tuner,
    micro_batches,
    repeatable_attention,
    schedule,
    tunable,
)
from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder
from evaluators.model.forward import final_hidden
from evaluators.model.head import Head
from evaluators.prepare.bank import Bank
from evaluators.settings import HealingSettings
from search.types import Fidelity, Genome

CHECKPOINT_STEPS = 10


class TrainedModel:
    """Holds a model in memory, which can be set to any genome and any float32 tensors, and its token windows."""

    def __init__(self, setup: EvaluatorSetup):
        self.space = setup.space
        self.windows = TokenWindows.load(setup.windows)
        self.model = BlockModel(ModelFolder(setup.model), best_device())
        self.simulated = SimulatedModel(self.model, Bank(setup.bank), setup.activations)

    def calibration_ids(self, rows: Sequence[int]) -> Tensor:
        """Return the token ids (n, T) of the calibration windows with indices ``rows``."""
        return torch.from_numpy(self.windows.windows["calibration"][list(rows)])

    @torch.inference_mode()
    def reference(self, ids: Tensor) -> Reference:
        """Return the unquantized model's reference for ``ids`` (n, T), with float32 tensors at their current values."""
        self.simulated.set_formats({})
        return Reference(final_hidden(self.model, ids), self.full_head, ids, self.windows.unscored)

    @property
    def full_head(self) -> Head:
        """The full-precision head, whatever format is set."""
        return self.model.head_with(self.simulated.full_weight(self.model.head_name))

    @contextmanager
    def scaled(self, genome: Genome, factors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Set ``genome`` with its scales multiplied by ``factors``, by tensor; see ``scale_gradients_of``."""
        formats = self.space.formats_of(genome)
        self.simulated.set_formats(formats, factors)
        with scale_gradients_of(self.model, self.simulated.bank, formats, factors) as gradients:
            yield gradients

    @torch.inference_mode()
    def divergence(
        self, genome: Genome, ids: Tensor, reference: Reference, factors: Mapping[str, Tensor] = NO_FACTORS
    ) -> Divergence:
        """Return the divergence of ``genome`` on ``ids`` (n, T) with the float32 tensors at their current values.

        Its scales are multiplied by ``factors``, by tensor.

        Raises FloatingPointError if the logits are not finite.
        """
        self.simulated.set_formats(self.space.formats_of(genome), factors)
        return reference.compare(self.simulated.head_input(final_hidden(self.model, ids)), self.model.head)


@dataclass(frozen=True)
class ReferenceStates:
    """Pool task that computes the full-precision model's final hidden states on windows of calibration text."""

    setup: EvaluatorSetup
    rows: tuple[int, ...]

    @property
    def label(self) -> str:
        return "heal[reference]"

    def run(self, state: dict[Any, Any]) -> Tensor:
        """Return the hidden states (n, T, D) on the CPU; ``state`` keeps the model for the worker's next task."""
        trained = warm(TrainedModel, self.setup, state)
        trained.simulated.set_formats({})
        hidden = final_hidden(trained.model, trained.calibration_ids(self.rows))
        return hidden.clone().cpu()  # not an inference tensor, so that autograd can use it


@dataclass(frozen=True)
class HealGradient:
    """Pool task that computes the gradient of the mean loss over some windows at the tuned ``values``."""

    setup: EvaluatorSetup
    genome: Genome
    values: Mapping[str, Tensor]  # float32 tensors, and multipliers of scales; see ``scales.divided``
    loss: DistillationLoss
    rows: tuple[int, ...]
    reference: Tensor  # (n, T, D), from ReferenceStates
    step: int

    @property
    def label(self) -> str:
        return f"heal[step {self.step}]"

    def run(self, state: dict[Any, Any]) -> dict[str, Tensor]:
        """Return the gradients on the CPU, by name of the value."""
        trained = warm(TrainedModel, self.setup, state)
        model, (floats, factors) = trained.model, divided(self.values)
        ids = trained.calibration_ids(self.rows).to(model.device)
        with (
            tunable(model, floats) as parameters,
            trained.scaled(self.genome, factors) as gradients,
            repeatable_attention(model.device),
        ):
            hidden = trained.simulated.head_input(model.run_from(0, model.embed(ids)))
            reference, unscored = self.reference.to(model.device), trained.windows.unscored
            head = model.head_with(model.weight(model.head_name))
            self.loss(hidden, head, reference, trained.full_head, ids, unscored).backward()
            return {name: gradient_of(parameter) for name, parameter in parameters.items()} | gradients


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Return the parameter's gradient on the CPU."""
    assert parameter.grad is not None
    return parameter.grad.cpu()


@dataclass(frozen=True)
class WholeHealing:
    """Trains float32 tensors and scales of one genome: a pool computes the gradients, this process takes the steps.

    The gradients of a step are summed in the order of its windows, so the result is the same, bit for bit, for any
    number of workers.
    """

    setup: EvaluatorSetup
    genome: Genome
    values: Mapping[str, Tensor]  # float32 tensors of the model by Hugging Face name, and multipliers of scales
    settings: HealingSettings
    windows: tuple[int, int]  # shape (n, T) of the calibration text
    checkpoint: HealingCheckpoint

    def train(self, run: Callable[[Sequence[Any]], Iterator[Any]]) -> Iterator[int]:
        """Train from the checkpoint to the last step, and yield the number of finished steps after each.

        ``run`` runs pool tasks and yields their results in order. A checkpoint is saved every CHECKPOINT_STEPS steps.
        """
        tuner = Tuner({n: nn.Parameter(t.clone()) for n, t in self.values.items()}, self.settings)
        if saved := self.checkpoint.load():
            tuner.load(saved[0], saved[1]["steps"])
        windows_of_steps = schedule(self.settings, *self.windows)
        while tuner.done < self.settings.steps:
            segment = windows_of_steps[tuner.done : tuner.done + CHECKPOINT_STEPS]
            reference = self.references(segment, run)
            for rows in segment:
                self.accumulate(tuner, rows, reference, run)
                tuner.step()
                yield tuner.done
            self.checkpoint.save(tuner.state(), steps=tuner.done)

    def references(self, segment: Tensor, run: Callable[[Sequence[Any]], Iterator[Any]]) -> dict[int, Tensor]:
        """Return, by index, the full-precision hidden states (T, D) of every window in ``segment`` (steps, batch)."""
        parts = micro_batches(segment.unique(), self.windows[1])
        states = run([ReferenceStates(self.setup, tuple(part.tolist())) for part in parts])
        return {
            row: h for part, hs in zip(parts, states, strict=True) for row, h in zip(part.tolist(), hs, strict=True)
        }

    def accumulate(
        self,
        tuner: Tuner,
        rows: Tensor,
        reference: Mapping[int, Tensor],
        run: Callable[[Sequence[Any]], Iterator[Any]],
    ) -> None:
        """Set the gradients of the tuner's parameters to that of the mean loss over windows ``rows`` (batch,).

        ``reference`` holds the full-precision hidden states (T, D) by window index.
        """
        values, parts = tuner.values(), micro_batches(rows, self.windows[1])
        tasks = []
        for part in parts:
            states = torch.stack([reference[row] for row in part.tolist()])
            shared = (self.setup, self.genome, values, DistillationLoss.of(self.settings))
            tasks.append(HealGradient(*shared, tuple(part.tolist()), states, tuner.done))
        for part, gradients in zip(parts, run(tasks), strict=True):
            for name, parameter in tuner.parameters.items():
                share = gradients[name] * (len(part) / len(rows))
                parameter.grad = share if parameter.grad is None else parameter.grad + share


@dataclass(frozen=True)
class Healed:
    """Holds the divergences from the full-precision model before and after healing on one split."""

    before: Divergence
    after: Divergence | None  # None if it is not finite

    @classmethod
    def measured(cls, before: Callable[[], Divergence], after: Callable[[], Divergence]) -> "Healed":
        """Measure both divergences, ``before`` first.

        The second is None if it is not finite. Raises FloatingPointError if the first is not finite.
        """
        found = before()
        try:
            return cls(found, after())
        except FloatingPointError:
            return cls(found, None)

    @property
    def better(self) -> bool:
        """Whether healing lowered the KL."""
        return self.after is not None and self.after.kl < self.before.kl

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Healed":
        """Return the value whose ``dataclasses.asdict`` is ``record``."""
        after = record["after"]
        return cls(Divergence.from_json(record["before"]), None if after is None else Divergence.from_json(after))


@dataclass(frozen=True)
class MeasureHealing:
    """Pool task that measures a genome's divergence with the original float32 tensors and scales, and with tuned."""

    setup: EvaluatorSetup
    genome: Genome
    values: Mapping[str, Tensor]
    fidelity: Fidelity

    @property
    def label(self) -> str:
        return f"healed[{self.fidelity.split}]"

    def run(self, state: dict[Any, Any]) -> Healed:
        """Return both divergences. Raises FloatingPointError if the first is not finite."""
        trained = warm(TrainedModel, self.setup, state)
        fidelity = self.fidelity
        ids = torch.from_numpy(trained.windows.take(fidelity.split, fidelity.tokens, fidelity.draw))
        reference = trained.reference(ids)  # with the original tensors, so outside of ``tunable``

        def after() -> Divergence:
            floats, factors = divided(self.values)
            with tunable(trained.model, floats):
                return trained.divergence(self.genome, ids, reference, factors)

        return Healed.measured(lambda: trained.divergence(self.genome, ids, reference), after)
