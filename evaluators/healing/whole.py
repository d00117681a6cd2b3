"""Tuning the float32 tensors of a quantized model (norms, biases) by distillation; every packed tensor stays as it is.

Workers compute gradients, a part of each step's windows each, and the driver takes the steps. Shapes: n windows, T
positions, D hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitgenome.common.devices import best_device
from evaluators.data.windows import TokenWindows
from evaluators.engine.divergence import Divergence, Reference
from evaluators.engine.evaluator import EvaluatorSetup, warm
from evaluators.healing.distillation import DistillationLoss
from evaluators.healing.quantized_model import SimulatedModel
from evaluators.healing.tuner import (
    FloatTuner,
    HealingCheckpoint,
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
    """A model in memory whose float32 tensors may change, and its text."""

    def __init__(self, setup: EvaluatorSetup):
        self.space = setup.space
        self.windows = TokenWindows.load(setup.windows)
        self.model = BlockModel(ModelFolder(setup.model), best_device())
        self.simulated = SimulatedModel(self.model, Bank(setup.bank), setup.activations)

    def calibration_ids(self, rows: Sequence[int]) -> Tensor:
        """(n, T) token ids of windows of calibration text."""
        return torch.from_numpy(self.windows.windows["calibration"][list(rows)])

    @torch.inference_mode()
    def reference(self, ids: Tensor) -> Reference:
        """Of the model's own tensors, as they are now."""
        self.simulated.set_formats({})
        return Reference(final_hidden(self.model, ids), self.full_head, ids)

    @property
    def full_head(self) -> Head:
        """The full-precision head, whatever is set."""
        return self.model.head_with(self.simulated.full_weight(self.model.head_name))

    @torch.inference_mode()
    def divergence(self, genome: Genome, ids: Tensor, reference: Reference) -> Divergence:
        """Of ``genome`` with the float32 tensors as they are now. Raises FloatingPointError if it is not finite."""
        self.simulated.set_formats(self.space.formats_of(genome))
        return reference.compare(self.simulated.head_input(final_hidden(self.model, ids)), self.model.head)


@dataclass(frozen=True)
class ReferenceStates:
    """Pool task: final hidden states (n, T, D) of the full-precision model on windows of calibration text."""

    setup: EvaluatorSetup
    rows: tuple[int, ...]

    @property
    def label(self) -> str:
        return "heal[reference]"

    def run(self, state: dict[Any, Any]) -> Tensor:
        trained = warm(TrainedModel, self.setup, state)
        trained.simulated.set_formats({})
        hidden = final_hidden(trained.model, trained.calibration_ids(self.rows))
        return hidden.clone().cpu()  # a tensor that gradients may use


@dataclass(frozen=True)
class HealGradient:
    """Pool task: gradients of the mean loss over some windows, by name, with float32 tensors ``floats``."""

    setup: EvaluatorSetup
    genome: Genome
    floats: Mapping[str, Tensor]
    loss: DistillationLoss
    rows: tuple[int, ...]
    reference: Tensor  # (n, T, D) of ReferenceStates
    step: int

    @property
    def label(self) -> str:
        return f"heal[step {self.step}]"

    def run(self, state: dict[Any, Any]) -> dict[str, Tensor]:
        trained = warm(TrainedModel, self.setup, state)
        model = trained.model
        trained.simulated.set_formats(trained.space.formats_of(self.genome))
        ids = trained.calibration_ids(self.rows).to(model.device)
        with tunable(model, self.floats) as parameters, repeatable_attention(model.device):
            hidden = trained.simulated.head_input(model.run_from(0, model.embed(ids)))
            self.loss(hidden, model.head, self.reference.to(model.device), trained.full_head, ids).backward()
            return {name: gradient_of(parameter) for name, parameter in parameters.items()}


def gradient_of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.cpu()


@dataclass(frozen=True)
class WholeHealing:
    """The full variant: one genome's training, its gradients computed by a pool, the steps taken here.

    A step's gradients are summed in the order of its windows, whoever computed them, so that any number of workers
    ends in the same bits.
    """

    setup: EvaluatorSetup
    genome: Genome
    floats: Mapping[str, Tensor]  # the model's own, by Hugging Face name
    settings: HealingSettings
    windows: tuple[int, int]  # shape (n, T) of the calibration text
    checkpoint: HealingCheckpoint

    def train(self, run: Callable[[Sequence[Any]], Iterator[Any]]) -> Iterator[int]:
        """Train from the checkpoint to the end, yielding the steps that are done; ``run`` runs pool tasks."""
        tuner = FloatTuner({n: nn.Parameter(t.clone()) for n, t in self.floats.items()}, self.settings)
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
        """Full-precision hidden states (T, D) of every window of some steps."""
        parts = micro_batches(segment.unique(), self.windows[1])
        states = run([ReferenceStates(self.setup, tuple(part.tolist())) for part in parts])
        return {
            row: h for part, hs in zip(parts, states, strict=True) for row, h in zip(part.tolist(), hs, strict=True)
        }

    def accumulate(
        self,
        tuner: FloatTuner,
        rows: Tensor,
        reference: Mapping[int, Tensor],
        run: Callable[[Sequence[Any]], Iterator[Any]],
    ) -> None:
        """Give the tuner's parameters the gradient of the mean loss over windows ``rows``."""
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
    """What healing did on one split: divergences from the full-precision model; None where they are not finite."""

    before: Divergence
    after: Divergence | None

    @classmethod
    def measured(cls, before: Callable[[], Divergence], after: Callable[[], Divergence]) -> "Healed":
        """Both divergences, measured in this order. Raises FloatingPointError if the first is not finite."""
        found = before()
        try:
            return cls(found, after())
        except (FloatingPointError, OverflowError):  # of the KL, of the perplexity
            return cls(found, None)

    @property
    def better(self) -> bool:
        return self.after is not None and self.after.kl < self.before.kl

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Healed":
        after = record["after"]
        return cls(Divergence.from_json(record["before"]), None if after is None else Divergence.from_json(after))


@dataclass(frozen=True)
class MeasureHealing:
    """Pool task: divergence of a genome with the model's own float32 tensors and with the tuned ones."""

    setup: EvaluatorSetup
    genome: Genome
    floats: Mapping[str, Tensor]
    fidelity: Fidelity

    @property
    def label(self) -> str:
        return f"healed[{self.fidelity.split}]"

    def run(self, state: dict[Any, Any]) -> Healed:
        trained = warm(TrainedModel, self.setup, state)
        fidelity = self.fidelity
        ids = torch.from_numpy(trained.windows.take(fidelity.split, fidelity.tokens, fidelity.draw))
        reference = trained.reference(ids)  # of the model's own tensors, so outside of ``tunable``

        def after() -> Divergence:
            with tunable(trained.model, self.floats):
                return trained.divergence(self.genome, ids, reference)

        return Healed.measured(lambda: trained.divergence(self.genome, ids, reference), after)
