"""Basic types of a search: gene, genome, search space, fidelity, evaluation and the strategy protocol."""

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
    """Return a hash of ``genome`` that stands in for it where a genome only has to be recognized.

    The hash has 16 bytes, however many genes there are.
    """
    return blake2b(bytes(genome), digest_size=16).digest()


@dataclass(frozen=True)
class Gene:
    """A gene is one decision: the format of a tensor, or of several tensors that share it."""

    name: str
    tensors: tuple[str, ...]  # Hugging Face names
    shapes: tuple[tuple[int, ...], ...]  # (rows, columns) of each tensor
    formats: tuple[QuantFormat, ...]  # legal for every tensor, smallest first

    def size_bytes(self, choice: int) -> int:
        """Return the bytes that this gene takes in the file at ``choice``, padding included."""
        return sum(padded(self.formats[choice].tensor_bytes(shape)) for shape in self.shapes)

    @property
    def weights(self) -> int:
        """Number of weights in the tensors of this gene."""
        return sum(prod(shape) for shape in self.shapes)


@dataclass(frozen=True)
class SearchSpace:
    """A search space holds all genes of a model, and the bytes of the file that no gene decides."""

    genes: tuple[Gene, ...]
    fixed_bytes: int  # header, metadata, tokenizer, tensor table, F32 tensors
    fixed_weights: int = 0  # weights of the tensors that no gene decides

    @classmethod
    def per_tensor(
        cls, shapes: Mapping[str, tuple[int, ...]], levels: Sequence[str], fixed_bytes: int, fixed_weights: int = 0
    ) -> "SearchSpace":
        """Return a space with one gene per tensor of ``shapes``, with the legal formats of ``levels``.

        ``shapes`` maps tensor names to (rows, columns). Raises ValueError for an unknown level.
        """
        genes = tuple(
            Gene(name, (name,), (tuple(shape),), legal_formats(levels, shape[-1])) for name, shape in shapes.items()
        )
        return cls(genes, fixed_bytes, fixed_weights)

    @property
    def weights(self) -> int:
        """Number of weights in all tensors of the file."""
        return self.fixed_weights + sum(gene.weights for gene in self.genes)

    def sizes(self) -> list[np.ndarray]:
        """Return the bytes of each gene at each choice: one int64 vector (choices,) per gene."""
        return [np.array([g.size_bytes(c) for c in range(len(g.formats))], dtype=np.int64) for g in self.genes]

    def file_bytes(self, genome: Genome) -> int:
        """Return the exact size of the GGUF file. Raises ValueError if ``genome`` does not belong to this space."""
        self.check(genome)
        return self.fixed_bytes + sum(g.size_bytes(c) for g, c in zip(self.genes, genome, strict=True))

    def bits_per_weight(self, genome: Genome) -> float:
        """Return the bits of the whole file over all weights of the model. Raises ValueError as file_bytes does."""
        return 8 * self.file_bytes(genome) / self.weights

    def formats_of(self, genome: Genome) -> dict[str, QuantFormat]:
        """Return the format of every tensor that ``genome`` decides, by Hugging Face name."""
        chosen = zip(self.genes, genome, strict=True)
        return {tensor: gene.formats[choice] for gene, choice in chosen for tensor in gene.tensors}

    def smallest(self) -> Genome:
        """Return the genome with every gene at its smallest format."""
        return (0,) * len(self.genes)

    def largest(self) -> Genome:
        """Return the genome with every gene at its largest format."""
        return tuple(len(g.formats) - 1 for g in self.genes)

    def check(self, genome: Genome) -> None:
        """Raise ValueError unless ``genome`` has one legal choice for every gene."""
        if len(genome) != len(self.genes):
            raise ValueError(f"genome has {len(genome)} genes, the space has {len(self.genes)}")
        for gene, choice in zip(self.genes, genome, strict=True):
            if not 0 <= choice < len(gene.formats):
                raise ValueError(f"choice {choice} of gene {gene.name} is not in 0..{len(gene.formats) - 1}")


@dataclass(frozen=True, slots=True)
class Fidelity:
    """A fidelity says which text an evaluation reads, if any; losses of different fidelities are never ranked together.

    Fewer ``tokens`` of the same ``draw`` are a prefix of more, so that a ladder of fidelities reads nested text.
    """

    split: str  # "search", "validation" or "test"
    tokens: int
    draw: int = 0  # number of the seeded random order of the split's windows; 0: their own order


@lru_cache(maxsize=1024)
def fidelity_of(split: str, tokens: int, draw: int) -> Fidelity:
    """Return the fidelity of these values: one shared object for all evaluations on a text."""
    return Fidelity(split, tokens, draw)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation holds what was measured of one genome on one text."""

    genome: Genome
    loss: float  # what the search minimizes
    kl: float  # nats per token, full-precision model to quantized model
    logit_mse: float
    perplexity: float
    reconstruction: float  # Hessian-weighted errors of all tensors over their output powers
    file_bytes: int
    split: str
    tokens: int
    seconds: float = 0.0
    draw: int = 0
    window_kl: tuple[float, ...] = ()  # ``kl`` of each window of text, in order, for standard errors

    @property
    def fidelity(self) -> Fidelity:
        """The text that this evaluation read."""
        return fidelity_of(self.split, self.tokens, self.draw)

    def to_json(self) -> dict[str, Any]:
        """Return a strict JSON record, in which a number that is not finite is null; from_json reads null as NaN."""
        values = ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        record = {name: None if isinstance(v, float) and not isfinite(v) else v for name, v in values}
        return {**record, "genome": list(self.genome), "window_kl": list(self.window_kl)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Evaluation":
        """Return the evaluation of a record made by to_json. Raises KeyError or TypeError if it is no evaluation."""
        fields: dict[str, Any] = {key: nan if value is None else value for key, value in record.items()}
        return cls(**fields | {"genome": tuple(record["genome"]), "window_kl": tuple(record.get("window_kl", ()))})


def rank(evaluation: Evaluation) -> tuple[float, int, Genome]:
    """Return the sort key for evaluations of one fidelity, best first: loss (not finite: last), bytes, then genome."""
    loss = evaluation.loss if isfinite(evaluation.loss) else inf
    return loss, evaluation.file_bytes, evaluation.genome


class Scored(NamedTuple):
    """A scored genome holds its loss, infinite if it has none, and the text that the loss was measured on."""

    genome: Genome
    loss: float
    fidelity: Fidelity

    @classmethod
    def of(cls, evaluation: Evaluation) -> "Scored":
        """Return the genome of ``evaluation`` with its loss; a loss that is not finite becomes infinite."""
        loss = evaluation.loss if isfinite(evaluation.loss) else inf
        return cls(evaluation.genome, loss, evaluation.fidelity)

    def to_json(self) -> list[Any]:
        """Return the record [genome, loss, [split, tokens, draw]], in which an infinite loss is null."""
        text = [self.fidelity.split, self.fidelity.tokens, self.fidelity.draw]
        return [list(self.genome), self.loss if isfinite(self.loss) else None, text]

    @classmethod
    def from_json(cls, record: Sequence[Any]) -> "Scored":
        """Return the scored genome of a record made by to_json."""
        genome, loss, fidelity = record
        return cls(tuple(genome), inf if loss is None else loss, fidelity_of(*fidelity))


class Strategy(Protocol):
    """A strategy proposes genomes and learns from their losses; only ``tell`` advances it."""

    @property
    def expected_evaluations(self) -> int:
        """Number of genomes that the whole run will ask for; fewer if the space runs out of new ones."""

    def ask(self) -> list[Genome]:
        """Return feasible genomes to evaluate next, none of them asked before; [] when finished.

        Asking again without ``tell`` returns the same genomes.
        """

    @property
    def incumbents(self) -> list[Genome]:
        """Genomes told before that new ones have to beat; [] for a strategy that compares none."""

    def tell(self, evaluations: Sequence[Evaluation], rescored: Sequence[Evaluation] = ()) -> None:
        """Take in the results for the last ``ask``, in its order, each from the highest rung that its genome reached.

        If the text is not that of the batch before, ``rescored`` are the incumbents evaluated on the new text. Raises
        ValueError if the results are not those expected.
        """

    @property
    def diagnostics(self) -> dict[str, Any]:
        """Figures on the last batch told, JSON-serializable: how well the strategy's predictions held, if any."""

    def state_dict(self, since: int = 0) -> dict[str, Any]:
        """Return the JSON-serializable state, random state included.

        Of the batches told it holds only those from ``since`` on.
        """

    def forget(self, batches: int) -> None:
        """Drop from memory the first ``batches`` told, which are on file, except what proposals still look at."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where ``state_dict`` was taken."""
