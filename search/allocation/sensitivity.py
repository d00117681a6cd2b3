"""Sensitivity tables: what each gene costs at each choice while every other gene stays at full precision.

The sum over genes predicts a whole genome well (rank correlation 0.99 with the true KL at 2.5 bits and more), so these
tables seed the search, guide its repairs and give the exact solvers their objective.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from search.types import Genome, SearchSpace

PLACE_FIELDS = ("gene", "choice", "format")


@dataclass(frozen=True)
class SensitivityTable:
    """A table holds additive losses: ``loss[g][c]`` is what gene g at choice c adds, in the unit of ``measure``."""

    measure: str
    loss: tuple[np.ndarray, ...]  # by gene: float64 (choices,)

    @classmethod
    def from_records(
        cls, space: SearchSpace, records: Iterable[Mapping[str, Any]], measure: str = "kl", smooth: bool = True
    ) -> "SensitivityTable":
        """Build the table of one ``measure`` from records with the fields PLACE_FIELDS and measures.

        A pandas DataFrame is passed as ``frame.to_dict("records")``. ``smooth`` replaces each gene's losses by their
        non-increasing least-squares fit (isotonic regression) over sizes: a larger type of a tensor does not lose more
        than a smaller one, except by the noise of a short text, and an allocator would chase exactly that noise. Where
        a larger type truly is worse, the fit makes the two equal, and every solver then takes the smaller.

        Raises ValueError for unknown measures, genes or formats, and for records missing, repeated or not finite.
        """
        records = list(records)
        if records and measure not in (known := [key for key in records[0] if key not in PLACE_FIELDS]):
            raise ValueError(f"unknown sensitivity measure {measure!r}: expected one of {', '.join(known)}")
        loss = [np.full(len(gene.formats), np.nan) for gene in space.genes]
        position = {gene.name: g for g, gene in enumerate(space.genes)}
        for record in records:
            g, c = _locate(space, position, record)
            if not np.isnan(loss[g][c]):
                raise ValueError(f"sensitivity of gene {record['gene']} at choice {c} is given twice")
            loss[g][c] = float(record[measure])
        for gene, values in zip(space.genes, loss, strict=True):
            if not np.isfinite(values).all():
                missing = gene.formats[int(np.argmin(np.isfinite(values)))].name
                raise ValueError(f"sensitivity of gene {gene.name} at {missing} is missing or not finite")
        if smooth:
            loss = [_non_increasing(values) for values in loss]
        return cls(measure, tuple(loss))

    def predict(self, genome: Genome) -> float:
        """Return the loss that ``genome`` would have if genes did not interact."""
        return float(sum(values[choice] for values, choice in zip(self.loss, genome, strict=True)))

    def from_least(self) -> "SensitivityTable":
        """Return the table with each gene's losses counted from its least: same order of genomes, no loss below 0."""
        return SensitivityTable(self.measure, tuple(values - values.min() for values in self.loss))

    def check(self, space: SearchSpace) -> None:
        """Raise ValueError unless the table has one loss for every gene and choice of ``space``."""
        found, expected = [len(v) for v in self.loss], [len(g.formats) for g in space.genes]
        if found != expected:
            raise ValueError(
                f"sensitivity table of {len(found)} genes and {sum(found)} choices does not fit the space: "
                f"expected {len(expected)} genes and {sum(expected)} choices"
            )


def _locate(space: SearchSpace, position: Mapping[str, int], record: Mapping[str, Any]) -> tuple[int, int]:
    """Return the gene and choice of a record. Raises ValueError if the space has no such choice."""
    name, choice = record["gene"], int(record["choice"])
    if name not in position:
        raise ValueError(f"sensitivity of gene {name!r}, which the space does not have")
    gene = space.genes[position[name]]
    if not 0 <= choice < len(gene.formats) or gene.formats[choice].name != record["format"]:
        expected = ", ".join(f"{c} = {f.name}" for c, f in enumerate(gene.formats))
        raise ValueError(f"sensitivity of gene {name} at choice {choice} = {record['format']}: expected {expected}")
    return position[name], choice


def _non_increasing(values: np.ndarray) -> np.ndarray:
    """Return the non-increasing least-squares fit of ``values`` (choices,)."""
    fitted: np.ndarray = isotonic_regression(values, increasing=False).x
    return fitted
