"""Plans a run before any weight is read: genes, sizes, budget and evaluations."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import prod

from bitgenome.common.errors import UserError
from bitgenome.config.run import BudgetConfig, RunConfig
from bitgenome.plan.imatrix import imatrix_importance
from bitgenome.plan.pruning import sparsity_by_tensor
from bitgenome.plan.template import check_exportable, file_layout, report
from bitgenome.plan.text import check_text
from bitgenome.storage.opened import open_model
from evaluators.model.checks import check_model
from evaluators.model.folder import ModelFolder
from evaluators.prepare.scaling import check_scalable
from exporters.files.file_layout import FileLayout
from exporters.metadata.hyperparameters import attention_window
from exporters.template.layout import TemplateLayout
from quantizers.settings import CompensationSettings, Sparsity
from search.budget import Budget
from search.gene_groups import kind_labels, layer_labels, tied_genes
from search.types import SearchSpace

log = logging.getLogger(__name__)

COMPENSATION_KEYS = {field.name for field in fields(CompensationSettings)}
LABELS = {"kind": kind_labels, "layer": layer_labels}  # groups that need no measurement


@dataclass(frozen=True)
class Plan:
    """Holds a configuration that can be met, with its model, search space and budget."""

    config: RunConfig
    folder: ModelFolder
    file: FileLayout  # what the file will hold
    space: SearchSpace
    budget: Budget
    sparsity: Mapping[str, Sparsity]  # by name of the tensors that are pruned

    @property
    def search_evaluations(self) -> int:
        """Number of genomes that the search evaluates."""
        if self.config.search.strategy == "exact":
            return 0
        return self.config.search.evaluations

    @property
    def search_rungs(self) -> list[tuple[int, int]]:
        """Tokens and number of evaluations of each rung.

        Elites that are evaluated again on new text count; genomes that are promoted for doubt do not.
        """
        ladder, search = self.config.ladder, self.config.search
        generations = self.search_evaluations // search.population
        counts = [generations * count for count in ladder.counts(search.population)]
        if search.strategy == "genetic":
            counts[-1] += search.elites * ladder.turns(generations)
        return list(zip(ladder.rungs, counts, strict=True))

    @property
    def sensitivity_evaluations(self) -> int:
        """Number of pairs of a gene and one of its levels."""
        return sum(len(gene.formats) for gene in self.space.genes)


def make_plan(config: RunConfig, weights: bool = True) -> Plan:
    """Check model, architecture, budget and text, and return the plan.

    Without ``weights`` a GGUF model is not opened: the plan's folder then has its headers alone. Raises UserError (one
    sentence) for the first that does not fit.
    """
    folder = checked_folder(config, weights)
    check_window(config.text.window, folder)
    file = file_layout(config, folder)
    if isinstance(file, TemplateLayout):
        report(file)
    check_foldable(config, file)
    shapes = file.shapes
    if config.quantization.scaling.active:
        check_scalable(folder)
    free = free_space(file, folder, config.levels)
    groups = config.search.gene_groups
    if groups.count is not None and groups.count > len(shapes):
        raise UserError(
            f"expected search.gene_groups.count from 1 to {len(shapes)}, the model's quantizable tensors, "
            f"found {groups.count}"
        )
    if groups.by == "mutual_information" and groups.samples > config.text.tokens.calibration:
        raise UserError(
            f"expected search.gene_groups.samples up to text.tokens.calibration ({config.text.tokens.calibration}), "
            f"found {groups.samples}"
        )
    labels = LABELS[groups.by](free) if groups.by in LABELS else {}
    space, budget = tied_space(config, file, free, labels)
    check_text(config.text, folder)
    imatrix_importance(config.quantization, file, shapes)
    sparsity = sparsity_by_tensor(config.quantization.pruning, file.kinds, space)
    return Plan(config, folder, file, space, budget, sparsity)


def free_space(file: FileLayout, folder: ModelFolder, levels: Sequence[str]) -> SearchSpace:
    """Return the space of all files like ``file``: a gene for each tensor, one for those that share one in the file."""
    fixed_weights = sum(prod(shape) for name, shape in folder.shapes.items() if name not in file.shapes)
    free = SearchSpace.per_tensor(file.shapes, levels, file.fixed_bytes(), fixed_weights)
    return replace(free, genes=tied_genes(free, file.tied))


def checked_folder(config: RunConfig, weights: bool = True) -> ModelFolder:
    """Return a model's folder; raise UserError unless it can be exported and its weights fit its config.json."""
    folder = open_model(config, weights)
    check_exportable(config, folder)
    check_model(folder)
    return folder


def check_foldable(config: RunConfig, file: FileLayout) -> None:
    """Raise UserError if channels are to be scaled and the file takes norms, which scales fold into, from elsewhere."""
    if config.quantization.scaling.active and isinstance(file, TemplateLayout) and file.unhealed:
        raise UserError(
            f"expected a template that holds all of the model's norms and biases as they are, which scaling changes, "
            f"found none of the values of {file.unhealed[0]}"
        )


def check_window(tokens: int, folder: ModelFolder) -> None:
    """Raise UserError if windows of ``tokens`` are longer than the model's sliding window, which llama.cpp ignores.

    Up to that length model and file compute the same; warns that for longer ones they do not.
    """
    window = attention_window(folder)
    if window is None:
        return
    if tokens > window:
        raise UserError(
            f"expected text.window at most the model's sliding window ({window}), found {tokens}: llama.cpp attends to "
            "all tokens, so longer texts would be scored otherwise than the file computes them"
        )
    if window < folder.config["max_position_embeddings"]:
        log.warning(
            "the model attends to %d tokens back, llama.cpp to all: texts longer than %d tokens differ", window, window
        )


def tied_space(
    config: RunConfig, file: FileLayout, space: SearchSpace, labels: Mapping[str, str]
) -> tuple[SearchSpace, Budget]:
    """Return ``space`` with the tensors of each label tied into one gene, and the budget in that space.

    The genome is stored in the file, so its length changes the size. Raises UserError if the budget cannot be met.
    """
    genes = tied_genes(space, labels)
    tied = SearchSpace(genes, file.fixed_bytes(len(genes)), space.fixed_weights)
    try:
        return tied, budget_of(config.budget, tied)
    except ValueError as error:
        raise UserError(str(error)) from None


def budget_of(config: BudgetConfig, space: SearchSpace) -> Budget:
    """Return a configured budget in exact bytes. Raises ValueError, with both bounds, if the space cannot meet it."""
    if config.bits_per_weight is not None:
        return Budget.from_bits_per_weight(space, config.bits_per_weight)
    if config.compression_ratio is not None:
        return Budget.from_compression(space, config.compression_ratio)
    assert config.file_size is not None
    return Budget.from_size(space, config.file_size)


def compensation_settings(plan: Plan) -> CompensationSettings:
    """Return the settings of rounding for the bank."""
    return CompensationSettings(**plan.config.quantization.model_dump(include=COMPENSATION_KEYS))
