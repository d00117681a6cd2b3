"""Finds the mixes that a search starts from (``search.seeds``): recipes, and what other runs have found.

A recipe gives types to GGUF tensors by name; a run its genomes, which are read through the types of its tensors. Either
is then brought to the budget.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from bitgenome.common import layout
from bitgenome.common.errors import UserError, expecting
from bitgenome.common.files import json_object
from bitgenome.plan.plan import LABELS, Plan
from bitgenome.storage.run_files import RunFiles, record_in, run_files
from bitgenome.storage.run_names import run_location
from bitgenome.storage.run_result import RunResult
from exporters.files.recipe import chosen_types, read_recipe
from quantizers.formats.table import FORMATS, LEVEL_FORMATS, QuantFormat, format_for
from search.allocation.repair import Repair
from search.allocation.seeds import nearest_uniform
from search.allocation.sensitivity import SensitivityTable
from search.gene_groups import tied_genes
from search.loop.neighbours import near_evaluated
from search.types import Evaluation, Gene, Genome, SearchSpace
from workers.storage.folders import is_url

log = logging.getLogger(__name__)

NEAR = 8  # genomes taken of what a run has evaluated, beside its winner


@dataclass(frozen=True)
class StartingGenomes:
    """Holds feasible genomes: ``named`` ones, which the winner is compared with, and ``others`` worth evaluating."""

    named: Mapping[str, Genome]
    others: tuple[Genome, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value, which ``from_json`` reads."""
        return {"named": {name: list(g) for name, g in self.named.items()}, "others": [list(g) for g in self.others]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "StartingGenomes":
        """Return what ``to_json`` made."""
        named = {name: tuple(genome) for name, genome in record["named"].items()}
        return cls(named, tuple(tuple(genome) for genome in record["others"]))


@dataclass(frozen=True)
class Mix:
    """Holds a genome as it was found, whatever its size, and what the run that it is of has evaluated, if it is one."""

    name: str
    genome: Genome
    evaluated: tuple[Evaluation, ...] = ()


def check_seeds(plan: Plan) -> None:
    """Raise UserError for the first of ``search.seeds`` that cannot be used, naming the line of a recipe."""
    for seed in plan.config.search.seeds:
        read_mix(plan, seed)


def starting_genomes(plan: Plan, table: SensitivityTable) -> StartingGenomes:
    """Return the genomes of ``search.seeds``, brought to the budget by ``table``. Raises as ``check_seeds``."""
    repair = Repair(plan.space, plan.budget, table)
    named: dict[str, Genome] = {}
    others: list[Genome] = []
    for seed in plan.config.search.seeds:
        mix = read_mix(plan, seed)
        named[mix.name] = repair.fit(mix.genome)
        others += near_evaluated(mix.evaluated, repair, table, NEAR)
    return StartingGenomes(named, tuple(dict.fromkeys(genome for genome in others if genome not in named.values())))


def read_mix(plan: Plan, seed: str) -> Mix:
    """Return the mix in a recipe file, or of a run by its directory, URL or name. Raises UserError if it is neither."""
    if not is_url(seed) and Path(seed).is_file():
        return recipe_mix(plan, Path(seed))
    return run_mix(plan, run_location(seed, plan.config.storage_root))


def recipe_mix(plan: Plan, path: Path) -> Mix:
    """Return the mix in a recipe; tensors that it leaves out take the uniform level nearest to the budget.

    Raises UserError, naming the line, for what is no recipe, and for tensors and types that the run does not have.
    """
    with expecting("lines NAME=TYPE", path):
        entries = read_recipe(path.read_text(encoding="utf-8"), str(path))
    names = [tensor.name for tensor in plan.file.tensors if len(tensor.shape) > 1]
    chosen = chosen_types(entries, names, str(path))
    searched = {tensor.name for tensor in plan.file.searched}
    left_out = [name for name in searched if name not in chosen]
    if left_out:
        log.info("%s leaves out %d of %d tensors: they start uniform", path, len(left_out), len(searched))
    base = nearest_uniform(plan.space, plan.budget)
    choices = []
    for gene, choice in zip(plan.space.genes, base, strict=True):
        found: dict[int, tuple[str, int]] = {}  # by choice: the type and the line that gives it
        for tensor, shape in zip(gene.tensors, gene.shapes, strict=True):
            for name in plan.file.names[tensor]:
                if name in searched and name in chosen:
                    kind, line = chosen[name]
                    where = f"line {line} of {path}"
                    found.setdefault(choice_of(gene, kind, shape[-1], where), (kind, line))
        if len(found) > 1:
            said = " and ".join(f"{kind} in line {line}" for kind, line in sorted(found.values(), key=lambda f: f[1]))
            raise UserError(f"expected one type for the tensors of gene {gene.name} in {path}, found {said}")
        choices.append(next(iter(found), choice))
    return Mix(f"from {path.name}", tuple(choices))


def choice_of(gene: Gene, type_name: str, columns: int, where: str) -> int:
    """Return the choice of ``gene`` that is of a GGUF type, or of what llama.cpp stores instead in such rows.

    Raises UserError, naming the place ``where`` the type was found, if the gene has no such choice.
    """
    names = [choice.name for choice in gene.formats]
    wanted = FORMATS.get(type_name)
    if wanted and not wanted.fits(columns) and wanted.level in LEVEL_FORMATS:
        wanted = format_for(wanted.level, columns)
    if wanted is None or wanted.name not in names:
        raise UserError(
            f"expected a type among the levels of the run ({', '.join(names)} for {gene.tensors[0]}) in {where}, found "
            f"{type_name}: add it to levels, or change it in the recipe"
        )
    return names.index(wanted.name)


def run_mix(plan: Plan, location: str) -> Mix:
    """Return the winner of a run, or its best so far, and what it has evaluated, as genomes of ``plan``'s space.

    Raises UserError for a run of other tensors, of levels that ``plan`` does not have, or without evaluations.
    """
    files = run_files(location)
    record = record_in(files.content(layout.RECORD), f"{location}/{layout.RECORD}")
    theirs = space_of_run(plan, files, record, location)
    if missing := sorted(theirs.levels - set(plan.config.levels)):
        raise UserError(f"expected levels of {location} that this run has too, found {', '.join(missing)} there alone")
    result = files.content(layout.BEST)
    winner = RunResult.parse(result, f"{location}/{layout.BEST}", location).evaluation if result else None
    evaluated = on_search_text(files, location)
    if winner is None and not evaluated:
        raise UserError(f"expected a run that has evaluated genomes, found none in {location}")
    best = winner or min(evaluated, key=lambda e: (-e.tokens, e.loss))
    if len(best.genome) != len(theirs.space.genes):
        raise UserError(
            f"expected a run of a model with these {len(theirs.space.genes)} genes, found {len(best.genome)} in "
            f"{location}"
        )
    name = f"from {PurePath(location).name}"
    if theirs.space.genes == plan.space.genes:
        return Mix(name, best.genome, evaluated)
    with expecting("genomes", location):
        theirs.space.check(best.genome)
    return Mix(name, translated(best.genome, theirs.space, plan.space, location))


@dataclass(frozen=True)
class TheirSpace:
    """Holds the genes of another run, as far as this run's model has its tensors, and its levels."""

    space: SearchSpace
    levels: set[str]


def space_of_run(plan: Plan, files: RunFiles, record: Mapping[str, Any], location: str) -> TheirSpace:
    """Return the genes that another run would have for the tensors of ``plan``'s model. Raises UserError if none."""
    with expecting("levels and gene groups", f"{location}/{layout.RECORD}"):
        levels = tuple(record["config"]["levels"])
        by = record["config"]["search"]["gene_groups"]["by"]
        free = SearchSpace.per_tensor(plan.file.shapes, levels, 0)
        free = SearchSpace(tied_genes(free, plan.file.tied), 0)
        labels = json_object(files.content(layout.GENE_GROUPS))
        labels = labels or (LABELS[by](free) if by in LABELS else {})
        return TheirSpace(SearchSpace(tied_genes(free, labels), 0), set(levels))


def translated(genome: Genome, theirs: SearchSpace, ours: SearchSpace, location: str) -> Genome:
    """Return the genome of ``ours`` whose tensors have the types of ``genome`` in ``theirs``.

    Raises UserError if tensors that share a gene of ``ours`` have several.
    """
    formats: dict[str, QuantFormat] = theirs.formats_of(genome)
    choices = []
    for gene in ours.genes:
        kinds = sorted({formats[tensor].name for tensor in gene.tensors})
        if len(kinds) > 1:
            raise UserError(
                f"expected one type for the tensors of gene {gene.name} in {location}, found {' and '.join(kinds)}"
            )
        choices.append([choice.name for choice in gene.formats].index(kinds[0]))
    return tuple(choices)


def on_search_text(files: RunFiles, location: str) -> tuple[Evaluation, ...]:
    """Return what a run has evaluated on search text, of the rung with most tokens. Raises UserError if damaged."""
    found = [e for e in read_evaluations(files, location) if e.split == "search" and e.tokens]
    most = max((evaluation.tokens for evaluation in found), default=0)
    return tuple(evaluation for evaluation in found if evaluation.tokens == most)


def read_evaluations(files: RunFiles, location: str) -> list[Evaluation]:
    """Return what a run has evaluated, oldest first, without touching it. Raises UserError if a line is damaged."""
    with expecting("evaluations", f"{location}/{layout.EVALUATIONS}"):
        whole = (line for line in files.lines(layout.EVALUATIONS) if line.endswith(b"\n"))
        return [Evaluation.from_json(json.loads(line)) for line in whole]
