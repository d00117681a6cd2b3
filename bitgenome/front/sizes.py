"""Says what every size of a finished run's model would give: what was measured, and what is predicted of the rest."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bitgenome.common import layout
from bitgenome.common.errors import UserError, expecting
from bitgenome.common.files import json_object
from bitgenome.plan.plan import Plan
from bitgenome.plan.seeds import read_evaluations
from bitgenome.run.gene_groups import plan_of_run
from bitgenome.run.sensitivities import table_of
from bitgenome.storage.run_directory import RunDirectory
from bitgenome.storage.run_files import LocalRunFiles
from bitgenome.storage.run_record import PARENT
from bitgenome.storage.run_result import RunResult
from exporters.files.gguf_reader import read_gguf
from exporters.files.mixes import DEFAULTS, LEGACY, MixModel, mix_bytes
from quantizers.formats.table import LEVEL_FORMATS
from search.allocation.front import best_by_size
from search.allocation.repair import TOLERANCE
from search.allocation.seeds import pure_uniform
from search.allocation.sensitivity import SensitivityTable
from search.budget import Budget
from search.types import Evaluation, Genome

STEPS = (0.05, 0.1, 0.25, 0.5, 1.0)  # bits per weight between two rows
MOST_ROWS = 16  # of one step
LEAST_KL = 1e-12


@dataclass(frozen=True)
class Size:
    """Holds what a file of one size gives: the best one that is known, by its KL on test text before healing.

    ``measured`` says that this very genome was measured, by simulation; otherwise its KL is predicted.
    """

    file_bytes: int
    bits_per_weight: float
    kl: float
    measured: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Front:
    """Holds the sizes of a model's files, smallest first, and how far predictions were from what was measured."""

    run: str
    smallest: int
    largest: int
    sizes: tuple[Size, ...]
    calibrated_on: int  # genomes
    mixes: Mapping[str, int]  # bytes of llama.cpp's own files of the model, by its name for each


def front_of(location: str) -> Front:
    """Return what every size of the model of a finished run would give.

    KLs are on test text. Those of genomes that were not measured are predicted from the sensitivities, calibrated by
    those that were. Raises UserError if the run is not finished, or its sensitivities are damaged.
    """
    run = RunDirectory.open(location)
    with run.own() if run.mirror else nullcontext():
        result = RunResult.read(run.path)
        if result is None:
            raise UserError(
                f"expected a finished run with {layout.BEST}, found none in {location}: bitgenome resume {location}"
            )
        plan = plan_of_run(run)
        table = sensitivities_of(plan, run)
        relatives = [run.path, *exports_of(run)]
        measured = {e.genome: e for path in relatives for e in on_test_text(path, plan)}
        winners = {path: found.evaluation.genome for path in relatives if (found := RunResult.read(path))}
        mixes = mix_sizes(run.path / result.gguf)
    return make_front(plan, table, run.path, measured, winners, mixes)


def make_front(
    plan: Plan,
    table: SensitivityTable,
    run: Path,
    measured: Mapping[Genome, Evaluation],
    winners: Mapping[Path, Genome],
    mixes: Mapping[str, int],
) -> Front:
    """Return the front of a plan's space.

    ``measured`` holds evaluations on test text, ``winners`` the genome of each run directory, and ``mixes`` the bytes
    of llama.cpp's own files.
    """
    space = plan.space
    smallest, largest = space.file_bytes(space.smallest()), space.file_bytes(space.largest())
    uniform = pure_uniform(space, Budget(largest))
    predict = calibrated(table, measured, set(uniform.values()))
    notes: dict[int, list[str]] = {smallest: ["smallest"], largest: ["largest"]}
    for name, size in mixes.items():
        if smallest <= size <= largest:
            notes.setdefault(size, []).append(f"size of {name}")
    for level, genome in uniform.items():
        found = f", KL {measured[genome].kl:.5f}" if genome in measured else ""
        notes.setdefault(space.file_bytes(genome), []).append(f"all {LEVEL_FORMATS[level]}{found}")
    told = [*notes, *(space.file_bytes(genome) for genome in winners.values())]
    steps = [math.floor(bits * space.weights / 8) for bits in rounded_bits(8 * smallest, 8 * largest, space.weights)]
    between = [size for size in steps if all(abs(size - other) > TOLERANCE * size for other in told)]
    sizes = sorted({*between, *notes})
    rows = {}
    for size, genome in zip(sizes, best_by_size(space, table, sizes), strict=True):
        known = measured.get(genome)
        kl = known.kl if known else predict(genome)
        rows[size] = Size(size, 8 * size / space.weights, kl, bool(known), tuple(notes.get(size, ())))
    for path, genome in winners.items():
        size = space.file_bytes(genome)
        if genome in measured:
            kept = rows[size].notes if size in rows else ()
            rows[size] = Size(size, 8 * size / space.weights, measured[genome].kl, True, (note_on(path), *kept))
    ordered = tuple(rows[size] for size in sorted(rows))
    return Front(run.name, smallest, largest, ordered, len(measured), dict(mixes))


def mix_sizes(file: Path) -> dict[str, int]:
    """Return the bytes of llama.cpp's own files of the model of ``file``, by mix, smallest first.

    None are known without the file, or for an architecture whose rules are not.
    """
    if not file.is_file():
        return {}
    contents = read_gguf(file)
    shapes = {name: tensor.shape for name, tensor in contents.tensors.items()}
    kinds = {name: tensor.type_name for name, tensor in contents.tensors.items()}
    header = min(tensor.offset for tensor in contents.tensors.values())
    mixes = [mix for mix in DEFAULTS if mix not in LEGACY]
    try:
        model = MixModel.of(contents.key_values)
        sizes = {mix: mix_bytes(mix, shapes, model, kinds, header) for mix in mixes}
    except ValueError:
        return {}
    return dict(sorted(sizes.items(), key=lambda found: found[1]))


def rounded_bits(low: float, high: float, weights: int) -> list[float]:
    """Return bits per weight between ``low`` and ``high`` bits of a file, in the finest of STEPS of few enough rows."""
    first, last = low / weights, high / weights
    step = next((step for step in STEPS if (last - first) / step <= MOST_ROWS), STEPS[-1])
    return [step * n for n in range(math.floor(first / step) + 1, math.ceil(last / step))]


def calibrated(
    table: SensitivityTable, measured: Mapping[Genome, Evaluation], uniform: set[Genome]
) -> Callable[[Genome], float]:
    """Return a function that predicts the KL of a genome chosen by ``table``.

    The sum of sensitivities is multiplied by what measured genomes have over theirs. Uniform genomes span all sizes:
    between them the factor is interpolated by the logarithm of the sum. Genomes chosen for a low sum fall short of it
    by more, as the choice follows the noise of a short text: a second factor is their geometric mean over the first.
    """
    sums = {genome: max(table.predict(genome), LEAST_KL) for genome in measured}
    points = sorted((math.log(sums[g]), math.log(measured[g].kl / sums[g])) for g in usable(measured, uniform, True))
    chosen = usable(measured, uniform, False)

    def spread(total: float) -> float:
        if not points:
            return 0.0
        places, factors = zip(*points, strict=True)
        return float(np.interp(math.log(total), places, factors))

    excess = [math.log(measured[g].kl / sums[g]) - spread(sums[g]) for g in chosen]
    factor = float(np.mean(excess)) if excess else 0.0

    def predict(genome: Genome) -> float:
        total = max(table.predict(genome), LEAST_KL)
        own = 0.0 if genome in uniform else factor
        return total * math.exp(spread(total) + own)

    return predict


def usable(measured: Mapping[Genome, Evaluation], uniform: set[Genome], of_uniform: bool) -> list[Genome]:
    """Return the genomes of ``measured`` with a KL that has a logarithm: the uniform ones, or all others."""
    return [g for g, e in measured.items() if (g in uniform) == of_uniform and math.isfinite(e.kl) and e.kl > 0]


def sensitivities_of(plan: Plan, run: RunDirectory) -> SensitivityTable:
    """Return the table that a run's search was seeded with. Raises UserError if it is missing or damaged."""
    file = run.path / layout.SENSITIVITY
    remedy = f"bitgenome resume {run.location} measures them again"
    if not file.is_file():
        raise UserError(f"expected sensitivities in {file}, found no file: {remedy}")
    with expecting("sensitivities", file, remedy):
        return table_of(plan.space, pd.read_parquet(file), plan.config.sensitivity.measure)


def on_test_text(run: Path, plan: Plan) -> list[Evaluation]:
    """Return what a run has evaluated on test text."""
    tokens = plan.config.text.tokens.test
    found = read_evaluations(LocalRunFiles(run), str(run))
    return [e for e in found if e.split == "test" and e.tokens == tokens and len(e.genome) == len(plan.space.genes)]


def exports_of(run: RunDirectory) -> list[Path]:
    """Return the directories of the files of other sizes that were made from a run, where storage is local."""
    if run.mirror:
        return []
    records = sorted(run.path.resolve().parent.glob(f"*/{layout.RECORD}"))
    found = ((file.parent, json_object(file.read_bytes())) for file in records)
    return [path for path, r in found if r.get(PARENT) == run.path.resolve().name and same_text(r, run.record)]


def same_text(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two records are of runs of one model and text."""
    first, second = one.get("digests", {}), other.get("digests", {})
    return all(first.get(key) == second.get(key) for key in ("model", "text"))


def note_on(run: Path) -> str:
    """Return a note on the file of a run: its name, and what healing made of its KL."""
    result = RunResult.read(run)
    healing = result.healing if result else None
    after = healing["test"]["after"] if healing and healing["applied"] else None
    return run.name + (f", healed to {after['kl']:.5f}" if after else "")
