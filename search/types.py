"""The words of a search: gene, genome, space, budget, evaluation and the strategy protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from math import inf, isfinite, nan, prod
from typing import Any, NamedTuple, Protocol

import numpy as np

from quantizers.formats.table import QuantFormat, legal_formats, padded

Genome = tuple[int, ...]  # genome[g] indexes genes[g].formats


def fingerprint(genome: Genome) -> bytes:
    """16 bytes in place of a genome that is only to be known again: as many whatever its number of genes."""
    return blake2b(bytes(genome), digest_size=16).digest()


@dataclass(frozen=True)
class Gene:
    """One decision: a tensor, or tensors that take the same choice together."""

    name: str
    tensors: tuple[str, ...]  # Hugging Face names
    shapes: tuple[tuple[int, ...], ...]  # (rows, columns) of each tensor
    formats: tuple[QuantFormat, ...]  # legal for every tensor, smallest first

    def size_bytes(self, choice: int) -> int:
        """Bytes this gene takes in the file at ``choice``, padding included."""
        return sum(padded(self.formats[choice].tensor_bytes(shape)) for shape in self.shapes)

    @property
    def weights(self) -> int:
        return sum(prod(shape) for shape in self.shapes)


@dataclass(frozen=True)
class SearchSpace:
    """All genes of a model and the bytes of the file that no gene decides."""

    genes: tuple[Gene, ...]
    fixed_bytes: int  # header, metadata, tokenizer, tensor table, F32 tensors
    fixed_weights: int = 0  # weights of the tensors no gene decides

    @classmethod
    def per_tensor(
        cls, shapes: Mapping[str, tuple[int, ...]], levels: Sequence[str], fixed_bytes: int, fixed_weights: int = 0
    ) -> "SearchSpace":
        """One gene for each (rows, columns) of ``shapes``, with the legal formats of ``levels``."""
        genes = tuple(
            Gene(name, (name,), (tuple(shape),), legal_formats(levels, shape[-1])) for name, shape in shapes.items()
        )
        return cls(genes, fixed_bytes, fixed_weights)

    @property
    def weights(self) -> int:
        """Weights of every tensor in the file."""
        return self.fixed_weights + sum(gene.weights for gene in self.genes)

    def sizes(self) -> list[np.ndarray]:
        """Bytes by gene and choice: one int64 vector a gene."""
        return [np.array([g.size_bytes(c) for c in range(len(g.formats))], dtype=np.int64) for g in self.genes]

    def file_bytes(self, genome: Genome) -> int:
        """Exact size of the GGUF file. Raises ValueError if ``genome`` does not belong to this space."""
        self.check(genome)
        return self.fixed_bytes + sum(g.size_bytes(c) for g, c in zip(self.genes, genome, strict=True))

    def bits_per_weight(self, genome: Genome) -> float:
        """Bits of the whole file over all weights of the model."""
        return 8 * self.file_bytes(genome) / self.weights

    def formats_of(self, genome: Genome) -> dict[str, QuantFormat]:
        """The format of every tensor that ``genome`` decides, by Hugging Face name."""
        chosen = zip(self.genes, genome, strict=True)
        return {tensor: gene.formats[choice] for gene, choice in chosen for tensor in gene.tensors}

    def smallest(self) -> Genome:
        return (0,) * len(self.genes)

    def largest(self) -> Genome:
        return tuple(len(g.formats) - 1 for g in self.genes)

    def check(self, genome: Genome) -> None:
        """Raises ValueError unless ``genome`` has one legal choice for every gene."""
        if len(genome) != len(self.genes):
            raise ValueError(f"genome has {len(genome)} genes, the space has {len(self.genes)}")
        for gene, choice in zip(self.genes, genome, strict=True):
            if not 0 <= choice < len(gene.formats):
                raise ValueError(f"choice {choice} of gene {gene.name} is not in 0..{len(gene.formats) - 1}")


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Which text an evaluation reads, if any. Losses of different fidelity are never ranked together.

    Fewer ``tokens`` of the same ``draw`` are a part of more, so that a ladder of fidelities reads nested text.
    """

    split: str  # "search", "validation" or "test"
    tokens: int
    draw: int = 0  # number of the seeded random order that the split's windows are taken in; 0: as they are


@lru_cache(maxsize=1024)
def fidelity_of(split: str, tokens: int, draw: int) -> Fidelity:
    """One object for all evaluations on a text."""
    return Fidelity(split, tokens, draw)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured of one genome."""

    genome: Genome
    loss: float  # what the search minimizes
    kl: float  # nats per token, full-precision model to quantized model
    logit_mse: float
    perplexity: float
    reconstruction: float  # sum of relative Hessian-weighted errors
    file_bytes: int
    split: str
    tokens: int
    seconds: float = 0.0
    draw: int = 0
    window_kl: tuple[float, ...] = ()  # ``kl`` of every window of text, in its order: what standard errors are made of

    @property
    def fidelity(self) -> Fidelity:
        return fidelity_of(self.split, self.tokens, self.draw)

    def to_json(self) -> dict[str, Any]:
        """Strict JSON: a number that is not finite becomes null, and NaN when it is read again."""
        values = ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        record = {name: None if isinstance(v, float) and not isfinite(v) else v for name, v in values}
        return {**record, "genome": list(self.genome), "window_kl": list(self.window_kl)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Evaluation":
        """Raises KeyError or TypeError for a record that is no evaluation."""
        fields: dict[str, Any] = {key: nan if value is None else value for key, value in record.items()}
        return cls(**fields | {"genome": tuple(record["genome"]), "window_kl": tuple(record.get("window_kl", ()))})


def rank(evaluation: Evaluation) -> tuple[float, int, Genome]:
    """Order of evaluations of one fidelity, best first: loss (not finite: last), then bytes, then genome."""
    loss = evaluation.loss if isfinite(evaluation.loss) else inf
    return loss, evaluation.file_bytes, evaluation.genome


class Scored(NamedTuple):
    """A genome with its loss, infinite where it has none, and the text that the loss was read on."""

    genome: Genome
    loss: float
    fidelity: Fidelity

    @classmethod
    def of(cls, evaluation: Evaluation) -> "Scored":
        loss = evaluation.loss if isfinite(evaluation.loss) else inf
        return cls(evaluation.genome, loss, evaluation.fidelity)

    def to_json(self) -> list[Any]:
        text = [self.fidelity.split, self.fidelity.tokens, self.fidelity.draw]
        return [list(self.genome), self.loss if isfinite(self.loss) else None, text]

    @classmethod
    def from_json(cls, record: Sequence[Any]) -> "Scored":
        genome, loss, fidelity = record
        return cls(tuple(genome), inf if loss is None else loss, fidelity_of(*fidelity))


class Strategy(Protocol):
    """Proposes genomes and learns from their losses; only ``tell`` moves it on."""

    @property
    def expected_evaluations(self) -> int:
        """Genomes that the whole run will ask for; fewer if the space runs out of new ones."""

    def ask(self) -> list[Genome]:
        """Feasible genomes to evaluate next, none of them asked before; [] when finished.

        Asking again without ``tell`` gives the same genomes.
        """

    @property
    def incumbents(self) -> list[Genome]:
        """Told genomes that newcomers have to beat; [] for a strategy that compares none."""

    def tell(self, evaluations: Sequence[Evaluation], rescored: Sequence[Evaluation] = ()) -> None:
        """Results for the last ``ask``, in its order, each on as much text as its genome was found worth.

        On other text than before, ``rescored`` are the incumbents on it. Raises ValueError if either is not so.
        """

    @property
    def diagnostics(self) -> dict[str, Any]:
        """Figures on the last batch told, JSON-serializable: how the strategy's own predictions of it held, if any."""

    def state_dict(self, since: int = 0) -> dict[str, Any]:
        """JSON-serializable state, with the random state; of what was told, only the batches from ``since`` on."""

    def forget(self, batches: int) -> None:
        """Let go of the first ``batches`` told, which are on file, but for what proposals still look at."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where ``state_dict`` was taken."""
