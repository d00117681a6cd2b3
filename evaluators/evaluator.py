"""How good a genome is: simulated quantization against the full-precision model, and the pool tasks that measure it."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluators.bank import Bank
from evaluators.block_model import BlockModel
from evaluators.devices import best_device
from evaluators.divergence import Divergence, Reference
from evaluators.model_folder import ModelFolder
from evaluators.simulated import SimulatedModel, chunked, final_hidden, genome_formats
from evaluators.text import TokenWindows
from quantizers.formats import QuantFormat
from search.fitness import FitnessSettings, search_loss
from search.types import Evaluation, Fidelity, Genome, SearchSpace


@dataclass(frozen=True)
class EvaluatorSetup:
    """Everything a worker needs to evaluate genomes of one run."""

    model: Path
    bank: Path
    windows: Path  # file of TokenWindows
    space: SearchSpace
    fitness: FitnessSettings
    key: str  # digest of all else; a worker builds one evaluator for each
    activations: str = "float"  # or q8; see SimulatedModel


class GenomeEvaluator:
    """A warm model and bank. Results depend on genome, fidelity and setup alone."""

    def __init__(self, setup: EvaluatorSetup):
        self.setup = setup
        self.space = setup.space
        self.windows = TokenWindows.load(setup.windows)
        self.bank = Bank(setup.bank)
        self.block_model = BlockModel(ModelFolder(setup.model), best_device())
        self.simulated = SimulatedModel(self.block_model, self.bank, setup.activations)
        self._references: dict[Fidelity, Reference] = {}
        self._prefix: tuple[tuple[Fidelity, int], Tensor] | None = None

    def ids(self, fidelity: Fidelity) -> Tensor:
        """(B, T) token ids of a fidelity."""
        return torch.from_numpy(self.windows.take(fidelity.split, fidelity.tokens, fidelity.draw))

    def reference(self, fidelity: Fidelity) -> Reference:
        """Full-precision outputs; kept for the last two fidelities."""
        if fidelity not in self._references:
            ids = self.ids(fidelity)
            self.simulated.set_formats({})
            hidden = final_hidden(self.block_model, ids)
            while len(self._references) > 1:
                del self._references[next(iter(self._references))]
            head = self.block_model.head_with(self.simulated.full_weight(self.block_model.head_name))
            self._references[fidelity] = Reference(hidden, head, ids)
        return self._references[fidelity]

    @torch.inference_mode()
    def divergence(self, formats: dict[str, QuantFormat], fidelity: Fidelity) -> Divergence:
        """Divergence of the model with these tensors quantized so, all others full precision."""
        reference = self.reference(fidelity)
        self.simulated.set_formats(formats)
        hidden = self.simulated.head_input(final_hidden(self.block_model, self.ids(fidelity)))
        return reference.compare(hidden, self.block_model.head)

    def reconstruction(self, formats: dict[str, QuantFormat]) -> float:
        """Sum of Hessian-weighted errors over the sum of the outputs' own power, over the given tensors."""
        entries = [self.bank.entry(name, fmt) for name, fmt in formats.items()]
        return sum(e.error for e in entries) / max(sum(e.power for e in entries), torch.finfo(torch.float32).tiny)

    def evaluate(self, genome: Genome, fidelity: Fidelity) -> Evaluation:
        """Raises FloatingPointError, with the genome, if the model's outputs are not finite."""
        started = time.perf_counter()
        formats = genome_formats(self.space, genome)
        try:
            measured = self.divergence(formats, fidelity)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}: genome {list(genome)}") from None
        reconstruction = self.reconstruction(formats)
        size = self.space.file_bytes(genome)
        return Evaluation(
            genome=genome,
            loss=search_loss(
                self.setup.fitness,
                kl=measured.kl,
                reconstruction=reconstruction,
                logit_mse=measured.logit_mse,
                file_bytes=size,
                weights=self.space.weights,
            ),
            kl=measured.kl,
            logit_mse=measured.logit_mse,
            perplexity=measured.perplexity,
            reconstruction=reconstruction,
            file_bytes=size,
            split=fidelity.split,
            tokens=fidelity.tokens,
            draw=fidelity.draw,
            window_kl=measured.window_kl,
            seconds=time.perf_counter() - started,
        )

    @torch.inference_mode()
    def sensitivity(self, gene: int, fidelity: Fidelity) -> list[dict[str, Any]]:
        """What quantizing one gene alone costs, a record a choice; the rest of the model stays full precision.

        The blocks below the gene are run once, not once a choice.
        """
        reference = self.reference(fidelity)
        tensors = self.space.genes[gene].tensors
        block = max(0, min(self.block_model.block_of(name) for name in tensors))
        embedded = self.block_model.embedding_name in tensors
        records = []
        for choice, fmt in enumerate(self.space.genes[gene].formats):
            formats = dict.fromkeys(tensors, fmt)
            self.simulated.set_formats({})
            prefix = None if embedded else self._block_input(block, fidelity)
            self.simulated.set_formats(formats)
            if prefix is None:
                prefix = chunked(self.block_model.embed, self.ids(fidelity))
            hidden = chunked(partial(self.block_model.run_from, block), prefix)
            measured = reference.compare(self.simulated.head_input(hidden), self.block_model.head)
            entries = [self.bank.entry(name, fmt) for name in tensors]
            error, power = sum(e.error for e in entries), sum(e.power for e in entries)
            records.append(
                {
                    "gene": self.space.genes[gene].name,
                    "choice": choice,
                    "format": fmt.name,
                    "kl": measured.kl,
                    "logit_mse": measured.logit_mse,
                    "reconstruction": error,
                    "relative": error / power if power else 0.0,
                }
            )
        return records

    def _block_input(self, block: int, fidelity: Fidelity) -> Tensor:
        """(B, T, D) full-precision input of ``block``, kept for the last block asked."""
        key = (fidelity, block)
        if self._prefix is None or self._prefix[0] != key:
            hidden = chunked(self.block_model.embed, self.ids(fidelity))
            for index in range(block):
                hidden = chunked(partial(self.block_model.run_block, index), hidden)
            self._prefix = (key, hidden)
        return self._prefix[1]


def warm_evaluator(setup: EvaluatorSetup, state: dict[Any, Any]) -> GenomeEvaluator:
    """The worker's evaluator of this setup; that of another setup is dropped first."""
    if setup.key not in state:
        state.clear()
        state[setup.key] = GenomeEvaluator(setup)
    evaluator: GenomeEvaluator = state[setup.key]
    return evaluator


@dataclass(frozen=True)
class EvaluateGenome:
    """Pool task: one genome at one fidelity."""

    setup: EvaluatorSetup
    genome: Genome
    fidelity: Fidelity
    label: str

    def run(self, state: dict[Any, Any]) -> Evaluation:
        return warm_evaluator(self.setup, state).evaluate(self.genome, self.fidelity)


@dataclass(frozen=True)
class MeasureSensitivity:
    """Pool task: every choice of one gene."""

    setup: EvaluatorSetup
    gene: int
    fidelity: Fidelity

    @property
    def label(self) -> str:
        return f"sensitivity[{self.setup.space.genes[self.gene].name}]"

    def run(self, state: dict[Any, Any]) -> list[dict[str, Any]]:
        return warm_evaluator(self.setup, state).sensitivity(self.gene, self.fidelity)
