"""Decides which tensors of a model are pruned, and how much."""

import re
from collections.abc import Mapping

from bitgenome.common.errors import UserError
from bitgenome.config.quantization import PruningConfig
from quantizers.rounding.pruned_sparsegpt import check_prunable
from quantizers.settings import Sparsity
from search.types import SearchSpace

ENDS = ("token_embd", "output")  # kinds that only a rule prunes


def sparsity_by_tensor(config: PruningConfig, kinds: Mapping[str, str], space: SearchSpace) -> dict[str, Sparsity]:
    """Return the sparsity of the tensors that are pruned, by Hugging Face name, given the kind of each that may be.

    Raises UserError for a rule that matches no tensor, and for a tensor whose rows or formats cannot hold the zeros.
    """
    for rule in config.rules:
        if not any(re.search(rule.match, name) for name in kinds):
            raise UserError(
                f"expected match of a rule in quantization.pruning to be found in a tensor's name, such as "
                f"{', '.join(list(kinds)[:2])}, found {rule.match!r}"
            )
    chosen = {name: _sparsity_of(config, name, kind) for name, kind in kinds.items()}
    wanted = {name: sparsity for name, sparsity in chosen.items() if sparsity is not None}
    _check(wanted, space)
    return wanted


def _sparsity_of(config: PruningConfig, name: str, kind: str) -> Sparsity | None:
    """Return the sparsity of one tensor: that of the first rule that matches, else the general one."""
    for rule in config.rules:
        if re.search(rule.match, name):
            return rule.wanted()
    return None if kind in ENDS else config.wanted()


def _check(wanted: Mapping[str, Sparsity], space: SearchSpace) -> None:
    """Raise UserError for a tensor whose rows or formats cannot hold the zeros."""
    for gene in space.genes:
        for tensor, shape in zip(gene.tensors, gene.shapes, strict=True):
            for fmt in gene.formats if tensor in wanted else ():
                try:
                    check_prunable(fmt, wanted[tensor], shape[-1])
                except ValueError as error:
                    raise UserError(f"{error}, in {tensor}") from None
