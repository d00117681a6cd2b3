"""Reads best.json: what a run ended in."""

import json
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, field_validator

from bitgenome.common import layout
from bitgenome.common.errors import UserError, expecting
from search.types import Evaluation


class RunResult(BaseModel):
    """Holds the object in a run's best.json, of which only what other commands read is named here."""

    model_config = ConfigDict(extra="allow", frozen=True)

    winner: dict[str, Any]
    gguf: str  # name of the file in the run directory
    bits_per_weight: float
    budget_bytes: int
    healing: dict[str, Any] | None = None
    proof: dict[str, Any] | None = None  # None: llama.cpp has not run the file, and ``resume`` proves it
    gguf_bytes: int | None = None  # None in runs of earlier versions
    gguf_sha256: str | None = None

    @field_validator("proof")
    @classmethod
    def _of_this_version(cls, proof: dict[str, Any] | None) -> dict[str, Any] | None:
        """Return a proof; None for one of an early version, which is without the figures that others read."""
        return proof if proof and proof.get("figures") else None

    @property
    def evaluation(self) -> Evaluation:
        """The winner, as evaluated on validation text."""
        return Evaluation.from_json(self.winner)

    @classmethod
    def parse(cls, content: bytes, source: str, run: str | Path) -> Self:
        """Return the result of ``run`` in ``content``. Raises UserError, naming ``source``, if there is none."""
        with expecting("the result of a run", source, f"bitgenome resume {run} writes it again"):
            result = cls.model_validate(json.loads(content))
            checked = result.evaluation
        if not all(isinstance(choice, int) for choice in checked.genome) or Path(result.gguf).name != result.gguf:
            raise UserError(f"expected a genome and a file's name in {source}, found others: bitgenome resume {run}")
        return result

    @classmethod
    def read(cls, run: Path) -> Self | None:
        """Return the result of the run directory ``run``, None if it has none. Raises UserError as ``parse`` does."""
        file = run / layout.BEST
        return cls.parse(file.read_bytes(), str(file), run) if file.is_file() else None
