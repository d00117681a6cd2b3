"""This module evaluates genomes: it compares a simulated quantized model with the full-precision one, in pool tasks."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from bitgenome.common.devices import best_device, compute_type, release_memory, worker_memory
from bitgenome.common.host_memory import close_all
from evaluators.data.windows import TokenWindows
from evaluators.engine.batches import Batches
from evaluators.engine.compute import check_native
from evaluators.engine.divergence import Divergence, Reference
from evaluators.engine.memory import KEPT_TEXTS, TYPICAL_LOAD, Load, sweep_memory
from evaluators.engine.prefix_cache import PrefixCache
from evaluators.engine.sweep import Candidate, Sweep
from evaluators.engine.weights import ModelWeights
from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder
from evaluators.model.sizes import FLOAT_BYTES, ModelShape
from evaluators.prepare.bank import Bank
from evaluators.settings import Compute
from quantizers.formats.table import QuantFormat
from search.fitness import FitnessSettings, search_loss
from search.types import Evaluation, Fidelity, Genome, SearchSpace

T = TypeVar("T")

Text = tuple[Fidelity, int, int]  # with the first window and the one past the last of a part


class NotFiniteError(FloatingPointError):
    """Raised if a candidate's outputs are not finite; ``candidate`` is its index in the list of candidates."""

    def __init__(self, candidate: int, place: str):
        super().__init__(f"the quantized model's outputs are not finite from the {place} on")
        self.candidate = candidate


@dataclass(frozen=True)
class EvaluatorSetup:
    """Holds everything that a worker needs to evaluate genomes of one run."""

    model: Path
    bank: Path
    windows: Path  # file of TokenWindows
    space: SearchSpace
    fitness: FitnessSettings
    key: str  # digest of all other fields; a worker keeps one evaluator, for the last key
    activations: str = "float"  # or q8, llama.cpp's 8-bit inputs; see Sweep
    memory: int | None = None  # bytes that a worker may use; None: its share of what is free
    load: Load = TYPICAL_LOAD
    compute: Compute = "float32"  # of genome evaluation; healing and everything else use float32
    chosen: bool = False  # whether ``compute`` is what suited the first worker's device, and must suit the others'

    @property
    def in_float32(self) -> "EvaluatorSetup":
        """The same setup with float32 compute, for figures that are reported."""
        return replace(self, compute="float32")


class GenomeEvaluator:
    """Evaluates genomes with a model and a bank that stay loaded between calls.

    Results depend on genome, fidelity and setup alone, not on earlier calls. Raises UserError if the memory that
    ``setup`` allows does not hold even one block.
    """

    def __init__(self, setup: EvaluatorSetup):
        self.setup = setup
        self.space = setup.space
        self.windows = TokenWindows.load(setup.windows)
        self.bank = Bank(setup.bank)
        folder, device = ModelFolder(setup.model), best_device()
        formats = {name: gene.formats for gene in setup.space.genes for name in gene.tensors}
        limit = setup.memory or worker_memory(device)
        compute = compute_type(setup.compute, device)
        if setup.chosen:
            check_native(setup.compute, device)
        shape = ModelShape.of(folder)
        self.memory = sweep_memory(shape, formats, self.windows.window, setup.load, limit, compute)
        model = BlockModel(folder, device, compute)
        weights = ModelWeights(model, self.bank, self.memory.weights, self.memory.reserve)
        batches, cache = Batches(self.memory.windows), PrefixCache(self.memory.cache)
        self.sweep = Sweep(weights, batches, cache, setup.activations)
        self._last: tuple[Text, Reference] | None = None
        self._full_states: dict[Text, Tensor] = {}  # full-precision final hidden states of the last texts

    def close(self) -> None:
        """Free everything that this evaluator holds; it cannot be used again."""
        self.sweep.close()
        self._last = None
        self._full_states = {}

    def ids(self, fidelity: Fidelity) -> Tensor:
        """Return the token ids (B, T) of the text that ``fidelity`` reads."""
        return torch.from_numpy(self.windows.take(fidelity.split, fidelity.tokens, fidelity.draw))

    def divergences(
        self, candidates: Sequence[Candidate], fidelity: Fidelity, keep: Sequence[Candidate] = ()
    ) -> list[Divergence]:
        """Return the divergence of each candidate, a model with only the candidate's tensors quantized, in order.

        The hidden states of the prefixes of ``keep`` are cached (see Sweep.final_states). Text whose hidden states
        would take too much memory is read in parts. Raises NotFiniteError for the first candidate whose outputs are not
        finite.
        """
        ids = self.ids(fidelity)
        state = ids.shape[1] * self.sweep.model.state_width * FLOAT_BYTES
        most = max(len(candidates), self.setup.load.candidates)
        rows = min(len(ids), max(1, self.memory.states // (state * (most + 2))))
        starts = range(0, len(ids), rows)
        parts = [self._part(candidates, (fidelity, i, i + rows), ids[i : i + rows], keep) for i in starts]
        return [Divergence.of(torch.cat(errors)) for errors in zip(*parts, strict=True)]

    @torch.inference_mode()
    def _part(
        self, candidates: Sequence[Candidate], text: Text, ids: Tensor, keep: Sequence[Candidate]
    ) -> list[Tensor]:
        """Return the errors (B, 3) of each candidate on a part of the text, as Reference.errors does.

        A quantized head is decoded once for all candidates that share it.
        """
        full: list[Candidate] = [] if text in self._full_states else [{}]
        states = self.sweep.final_states(ids, text, [*candidates, *full], keep)
        if full:
            self._keep_full(text, states.pop())
        reference = self._reference(text, ids)
        by_format: dict[QuantFormat | None, list[int]] = {}
        for index, candidate in enumerate(candidates):
            by_format.setdefault(candidate.get(self.sweep.model.head_name), []).append(index)
        found: dict[int, Tensor] = {}
        for fmt, indices in by_format.items():
            hidden = [self.sweep.head_input(states[index], fmt) for index in indices]
            found.update(zip(indices, reference.errors(hidden, self.sweep.head(fmt)), strict=True))
            self.sweep.weights.release()
        release_memory()
        for index in range(len(candidates)):
            if not found[index].isfinite().all():
                raise NotFiniteError(index, self.sweep.first_overflow(ids, candidates[index]))
        return [found[index] for index in range(len(candidates))]

    def _reference(self, text: Text, ids: Tensor) -> Reference:
        """Return the full-precision model's outputs; those of the last text stay if their logits fit in memory."""
        if self._last is not None and self._last[0] == text:
            return self._last[1]
        self._last = None
        head, unscored = self.sweep.head(None), self.windows.unscored
        reference = Reference(self._full_states[text], head, ids, unscored, self.memory.logits)
        if self.memory.logits:
            self._last = (text, reference)
        return reference

    def _keep_full(self, text: Text, states: Tensor) -> None:
        """Keep the full-precision final hidden states of the last KEPT_TEXTS texts, in all of their parts."""
        texts = list(dict.fromkeys(fidelity for fidelity, *_ in [*self._full_states, text]))
        for kept in list(self._full_states):
            if kept[0] not in texts[-KEPT_TEXTS:]:
                del self._full_states[kept]
        self._full_states[text] = states

    def reconstruction(self, formats: Candidate) -> float:
        """Return the Hessian-weighted error of the tensors in ``formats``, relative to that of zeroing them all."""
        entries = [self.bank.entry(name, fmt) for name, fmt in formats.items()]
        return sum(e.error for e in entries) / max(sum(e.power for e in entries), torch.finfo(torch.float32).tiny)

    def evaluate(self, genomes: Sequence[Genome], fidelity: Fidelity, keep: Sequence[Genome] = ()) -> list[Evaluation]:
        """Return the evaluations of ``genomes``, in order, on the text of ``fidelity``.

        Hidden states of the prefixes of ``keep`` are cached for their offspring. ``seconds`` of an evaluation is the
        mean over ``genomes``. Raises FloatingPointError, with genome and block, if a model's outputs are not finite.
        """
        started = time.perf_counter()
        candidates = [self.space.formats_of(genome) for genome in genomes]
        kept = [self.space.formats_of(genome) for genome in keep]
        try:
            measured = self.divergences(candidates, fidelity, kept)
        except NotFiniteError as error:
            raise FloatingPointError(f"{error}: genome {list(genomes[error.candidate])}") from None
        seconds = (time.perf_counter() - started) / len(genomes)
        cases = zip(genomes, candidates, measured, strict=True)
        return [self._evaluation(*case, fidelity, seconds) for case in cases]

    def _evaluation(
        self, genome: Genome, formats: Candidate, measured: Divergence, fidelity: Fidelity, seconds: float
    ) -> Evaluation:
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
            seconds=seconds,
        )

    def sensitivity(
        self, genes: Sequence[int], fidelity: Fidelity, base: Genome | None = None
    ) -> list[list[dict[str, Any]]]:
        """Return what each choice of each gene costs: for each of ``genes`` a list with one record per choice.

        A candidate differs from one common model, full precision or ``base``, only in the gene's own tensors. A record
        holds gene, choice and format, the ``kl`` (nats per token) and ``logit_mse`` added to those of the common model,
        and the errors of ``Bank.errors``. With a ``base`` the added terms may be negative; they are 0 at its own
        choice. Raises NotFiniteError for a candidate whose outputs are not finite.
        """
        around = {} if base is None else self.space.formats_of(base)
        cases = [
            (gene, choice, dict.fromkeys(self.space.genes[gene].tensors, fmt))
            for gene in genes
            for choice, fmt in enumerate(self.space.genes[gene].formats)
        ]
        candidates = [{**around, **formats} for _, _, formats in cases]
        *measured, start = self.divergences([*candidates, around], fidelity, keep=[around])
        records: dict[int, list[dict[str, Any]]] = {gene: [] for gene in genes}
        for (gene, choice, _), found in zip(cases, measured, strict=True):
            target = self.space.genes[gene]
            place = {"gene": target.name, "choice": choice, "format": target.formats[choice].name}
            added = {"kl": found.kl - start.kl, "logit_mse": found.logit_mse - start.logit_mse}
            records[gene].append(place | added | self.bank.errors(target.tensors, target.formats[choice]))
        return list(records.values())


def warm(kind: Callable[[EvaluatorSetup], T], setup: EvaluatorSetup, state: dict[Any, Any]) -> T:
    """Return the worker's object ``kind(setup)``, built on the first call.

    ``state`` is the worker's own dict. It holds one such object: that of another kind or setup is closed first, and its
    memory is given back before ``kind`` measures how much is free.
    """
    key = (kind, setup.key, compute_type(setup.compute, best_device()))
    if key not in state:
        make_room(state)
        state[key] = kind(setup)
    found: T = state[key]
    return found


def make_room(state: dict[Any, Any]) -> None:
    """Free what a worker's ``state`` holds, and give the memory back to the device and the system."""
    close_all(state)
    release_memory()


def warm_evaluator(setup: EvaluatorSetup, state: dict[Any, Any]) -> GenomeEvaluator:
    """Return the worker's evaluator of ``setup``, as ``warm`` does."""
    return warm(GenomeEvaluator, setup, state)


@dataclass(frozen=True)
class EvaluateGenomes:
    """Pool task that evaluates genomes together at one fidelity, and caches the prefixes of ``keep``."""

    setup: EvaluatorSetup
    genomes: tuple[Genome, ...]
    fidelity: Fidelity
    label: str
    keep: tuple[Genome, ...] = ()

    @property
    def work(self) -> int:
        return len(self.genomes)

    def run(self, state: dict[Any, Any]) -> list[Evaluation]:
        """Return the evaluations in the order of ``genomes``."""
        return warm_evaluator(self.setup, state).evaluate(self.genomes, self.fidelity, self.keep)


@dataclass(frozen=True)
class MeasureSensitivity:
    """Pool task that measures every choice of some genes, alone or in place of the choice of ``base``."""

    setup: EvaluatorSetup
    genes: tuple[int, ...]
    fidelity: Fidelity
    base: Genome | None = None

    @property
    def label(self) -> str:
        names = [self.setup.space.genes[gene].name for gene in (self.genes[0], self.genes[-1])]
        return f"sensitivity[{names[0]}]" if len(self.genes) == 1 else f"sensitivity[{names[0]} to {names[-1]}]"

    @property
    def work(self) -> int:
        return len(self.genes)

    def run(self, state: dict[Any, Any]) -> list[list[dict[str, Any]]]:
        """Return the records of each gene, as ``GenomeEvaluator.sensitivity`` does."""
        return warm_evaluator(self.setup, state).sensitivity(self.genes, self.fidelity, self.base)
