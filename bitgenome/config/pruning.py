"""What a configuration may say about pruning, and what it amounts to for every tensor of a model."""

import re
from collections.abc import Mapping
from typing import Self

from pydantic import Field, model_validator

from bitgenome.common.errors import UserError
from bitgenome.config.file import Section
from exporters.metadata.source import ModelSource
from exporters.metadata.tensor_names import tensor_table
from quantizers.rounding.pruned_sparsegpt import check_prunable
from quantizers.rounding.pruning_masks import Sparsity
from search.types import SearchSpace

ENDS = ("token_embd", "output")  # kinds that only a rule prunes


class SparsityConfig(Section):
    """``sparsity``, a fraction of the weights, or ``pattern``, "n:m": n zeros in every m neighbours of a row."""

    sparsity: float | None = Field(None, description="0 (nothing) to below 1; chosen by 128 columns over all rows")
    pattern: str | None = Field(None, description='e.g. "2:4"; m is one of 2, 4, 8, 16, 32')

    @model_validator(mode="after")
    def valid(self) -> Self:
        if self.sparsity is not None and self.pattern is not None:
            raise ValueError(f"expected one of sparsity and pattern, found {self.sparsity:g} and {self.pattern!r}")
        self.wanted()
        return self

    def wanted(self) -> Sparsity | None:
        """None where nothing is pruned."""
        if self.pattern is not None:
            return Sparsity.of_pattern(self.pattern)
        return Sparsity.of_fraction(self.sparsity) if self.sparsity else None


class PruningRule(SparsityConfig):
    """A sparsity for the tensors whose Hugging Face name holds the regular expression ``match``."""

    match: str = Field(description='e.g. "layers\\.[01]\\." or "down_proj"; the first rule that matches decides')

    @model_validator(mode="after")
    def complete(self) -> Self:
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(f"expected a regular expression in match, found {self.match!r} ({error})") from None
        if self.sparsity is None and self.pattern is None:
            raise ValueError(f"expected sparsity or pattern for match {self.match!r}, found neither")
        return self


class PruningConfig(SparsityConfig):
    """Sparsity of every linear layer but embedding and head, which only a rule prunes, and rules that go before it."""

    rules: tuple[PruningRule, ...] = ()


def sparsity_by_tensor(config: PruningConfig, source: ModelSource, space: SearchSpace) -> dict[str, Sparsity]:
    """Sparsity of the tensors that are pruned.

    Raises UserError for a rule that matches no tensor, and for a tensor whose rows or formats cannot hold its zeros.
    """
    kinds = {entry.hf_name: entry.kind for entry in tensor_table(source) if entry.quantizable}
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
    for rule in config.rules:
        if re.search(rule.match, name):
            return rule.wanted()
    return None if kind in ENDS else config.wanted()


def _check(wanted: Mapping[str, Sparsity], space: SearchSpace) -> None:
    for gene in space.genes:
        for tensor, shape in zip(gene.tensors, gene.shapes, strict=True):
            for fmt in gene.formats if tensor in wanted else ():
                try:
                    check_prunable(fmt, wanted[tensor], shape[-1])
                except ValueError as error:
                    raise UserError(f"{error}, in {tensor}") from None
