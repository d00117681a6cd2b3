"""Search spaces and losses whose optimum a test can know."""

import itertools
import random
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from quantizers.formats.table import legal_formats
from search.allocation.sensitivity import SensitivityTable
from search.budget import Budget
from search.types import Evaluation, Fidelity, Gene, Genome, SearchSpace

LEVELS = ("W2", "W3", "W4", "W5", "W6", "W8")
SEARCH = Fidelity("search", 1024)
VALIDATION = Fidelity("validation", 4096)
WINDOW = 256  # tokens
POOL = 64  # windows of a split


def transformer_space(layers: int, width: int = 256, levels: Sequence[str] = LEVELS) -> SearchSpace:
    """Seven linears a layer and a tied embedding, as in Qwen2."""
    shapes: dict[str, tuple[int, ...]] = {"embedding": (1024, width)}
    for layer in range(layers):
        shapes |= {f"{layer}.{name}": (width, width) for name in ("q", "o")}
        shapes |= {f"{layer}.{name}": (width // 4, width) for name in ("k", "v")}
        shapes |= {f"{layer}.{name}": (4 * width, width) for name in ("gate", "up")}
        shapes[f"{layer}.down"] = (width, 4 * width)
    return SearchSpace.per_tensor(shapes, levels, fixed_bytes=20_011, fixed_weights=width * (2 * layers + 1))


def odd_space(rows: Sequence[int], levels: Sequence[str], fixed_bytes: int = 0) -> SearchSpace:
    """One gene for each of ``rows``, which decide its size."""
    genes = tuple(Gene(f"g{i}", (f"g{i}",), ((r, 256),), legal_formats(levels, 256)) for i, r in enumerate(rows))
    return SearchSpace(genes, fixed_bytes)


def random_table(space: SearchSpace, seed: int, measure: str = "kl") -> SensitivityTable:
    """Losses that fall fourfold a bit, with a log-normal sensitivity for each gene."""
    rng = np.random.default_rng(seed)
    loss = []
    for gene in space.genes:
        scale = gene.weights * np.exp(rng.normal()) / space.weights
        bits = np.array([f.bits_per_weight for f in gene.formats])
        loss.append(scale * 4.0**-bits * np.exp(0.1 * rng.normal(size=len(bits))))
    return SensitivityTable(measure, tuple(np.minimum.accumulate(values) for values in loss))


def all_genomes(space: SearchSpace) -> Iterator[Genome]:
    return itertools.product(*(range(len(gene.formats)) for gene in space.genes))


def random_genome(space: SearchSpace, rng: random.Random) -> Genome:
    return tuple(rng.randrange(len(gene.formats)) for gene in space.genes)


def middle_budget(space: SearchSpace, share: float = 0.35) -> Budget:
    """``share`` of the way from the smallest file to the largest."""
    low, high = space.file_bytes(space.smallest()), space.file_bytes(space.largest())
    return Budget(int(low + share * (high - low)))


class Landscape:
    """A known loss: an additive table, times interactions of random pairs of genes; ``noise`` of each window on top."""

    def __init__(
        self, space: SearchSpace, table: SensitivityTable, interaction: float = 0.0, seed: int = 0, noise: float = 0.0
    ) -> None:
        self.space, self.table, self.noise = space, table, noise
        rng = np.random.default_rng(seed)
        genes = len(space.genes)
        self._coupling = interaction * np.triu(rng.normal(size=(genes, genes)), 1) / np.sqrt(genes)
        self.calls: list[tuple[Genome, Fidelity]] = []

    def loss(self, genome: Genome) -> float:
        """sum_i loss_i + sum_ij coupling_ij sqrt(loss_i loss_j): errors that add up or cancel."""
        alone = np.array([values[c] for values, c in zip(self.table.loss, genome, strict=True)])
        root = np.sqrt(alone)
        return float(alone.sum() + root @ self._coupling @ root)

    def evaluation(self, genome: Genome, fidelity: Fidelity = SEARCH) -> Evaluation:
        windows = self.window_losses(genome, fidelity)
        loss = float(windows.mean()) if self.noise else self.loss(genome)
        return Evaluation(
            genome, loss, loss, loss, 1.0, loss, self.space.file_bytes(genome), fidelity.split, fidelity.tokens,
            draw=fidelity.draw, window_kl=tuple(windows.tolist()),
        )  # fmt: skip

    def window_losses(self, genome: Genome, fidelity: Fidelity) -> np.ndarray:
        """(n,) the truth, off by a normal error of ``noise`` times it that belongs to window and genome."""
        count = max(1, fidelity.tokens // WINDOW)
        order = np.random.default_rng(fidelity.draw).permutation(POOL) if fidelity.draw else np.arange(POOL)
        split = zlib.crc32(fidelity.split.encode())
        errors = [np.random.default_rng([split, window, *genome]).normal() for window in order[:count]]
        windows: np.ndarray = self.loss(genome) * (1 + self.noise * np.array(errors))
        return windows

    def __call__(self, genomes: Sequence[Genome], fidelity: Fidelity) -> Iterator[Evaluation]:
        for genome in genomes:
            self.calls.append((genome, fidelity))
            yield self.evaluation(genome, fidelity)
