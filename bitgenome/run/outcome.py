"""Collects what a run ends in: the closing table's rows on test text, and best.json."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from bitgenome.common import layout
from bitgenome.common.errors import UserError
from bitgenome.common.files import atomic_write_json
from bitgenome.plan.plan import Plan
from bitgenome.run.healing import Healing
from bitgenome.run.proof import Proof
from bitgenome.run.search import SearchResult
from bitgenome.storage.run_directory import RunDirectory
from bitgenome.storage.run_result import RunResult
from search.allocation.seeds import pure_uniform
from search.budget import Budget
from search.loop.archive import EvaluationLog
from search.loop.search import Evaluate, evaluate_missing
from search.loop.winner import Winner
from search.types import Fidelity


@dataclass(frozen=True)
class Row:
    """One row of the closing table: a genome measured on test text by simulation."""

    name: str
    file_bytes: int
    bits_per_weight: float
    kl: float
    perplexity: float


@dataclass(frozen=True)
class Outcome:
    """Holds everything that the closing table shows."""

    budget_bytes: int
    winner: Winner
    bits_per_weight: float
    rows: tuple[Row, ...]  # the winner first
    healing: Healing | None  # None: healing was off
    proof: Proof | None  # None until llama.cpp has run the file
    evaluations: int
    seconds: dict[str, float]  # by stage
    expected: dict[str, float]  # by stage, as forecast at the start
    file: Mapping[str, Any]  # name, size and sha256 of the file
    gguf: Path
    recipe: Path
    run: Path
    full_precision: str | None = None  # what it means, for a model that was not of floats


def comparison_rows(
    plan: Plan, result: SearchResult, healing: Healing | None, evaluate: Evaluate, archive: EvaluationLog
) -> tuple[Row, ...]:
    """Measure winner, seeds and every uniform level, whatever its size, on test text, and return a row for each genome.

    A genome with several names has one row. The winner comes first, followed by the healed one if there is one.
    """
    space = plan.space
    levels = pure_uniform(space, Budget(space.file_bytes(space.largest())))
    named = {
        "searched": result.winner.evaluation.genome,
        **result.seeds,
        **{f"uniform {level}": genome for level, genome in levels.items()},
    }
    genomes = list(dict.fromkeys(named.values()))
    fidelity = Fidelity("test", plan.config.text.tokens.test)
    rows = []
    for e in evaluate_missing(genomes, fidelity, evaluate, archive):
        name = " = ".join(key for key, value in named.items() if value == e.genome)
        rows.append(Row(name, e.file_bytes, space.bits_per_weight(e.genome), e.kl, e.perplexity))
    if healing and (after := healing.figures["test"].after):
        rows.insert(1, replace(rows[0], name="healed", kl=after.kl, perplexity=after.perplexity))
    return tuple(rows)


def save_outcome(directory: RunDirectory, outcome: Outcome, plan: Plan) -> None:
    """Write best.json into the run directory: once with what was searched, and again with the proof.

    llama.cpp may refuse the file; then ``resume`` proves it, and ``export`` writes it again.
    """
    winner = outcome.winner
    record = {
        "winner": winner.evaluation.to_json(),
        "validation": validation_record(winner),
        "formats": {name: f.name for name, f in plan.space.formats_of(winner.evaluation.genome).items()},
        "budget_bytes": outcome.budget_bytes,
        "bits_per_weight": outcome.bits_per_weight,
        "rows": [asdict(row) for row in outcome.rows],
        "healing": outcome.healing and outcome.healing.to_json(),
        "proof": outcome.proof and outcome.proof.to_json(),
        **({"full_precision": outcome.full_precision} if outcome.full_precision else {}),
        **outcome.file,
    }
    atomic_write_json(directory.path / layout.BEST, record)


def proved(directory: RunDirectory, file: Mapping[str, Any]) -> bool:
    """Return whether best.json has a proof of this very file, as ``shipped_file`` describes it."""
    with suppress(UserError):  # a damaged best.json is written again
        result = RunResult.read(directory.path)
        return result is not None and result.proof is not None and result.gguf_sha256 == file["gguf_sha256"]
    return False


def validation_record(winner: Winner) -> dict[str, Any]:
    """Return the validation figures for best.json: the KL of the winner minus that of the best reference.

    The difference is paired, in nats per token, on validation text. The standard error of a single window is null; all
    figures of the difference are null if the winner is itself the reference.
    """
    lead = winner.lead
    error = lead.standard_error if lead and isfinite(lead.standard_error) else None
    return {
        "reference": winner.reference,
        "kl_difference": lead and lead.mean,
        "standard_error": error,
        "windows": lead and lead.windows,
        "ties": winner.ties,
    }
