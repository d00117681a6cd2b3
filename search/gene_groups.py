"""Genes tied by group: tensors of one group take the same format, and the chromosome is shorter."""

import re
from collections.abc import Mapping

from search.types import Gene, SearchSpace

BLOCK = re.compile(r"^(.*?\.\d+)\.(.*)$")  # "model.layers.3", "mlp.up_proj.weight"


def kind_labels(space: SearchSpace) -> dict[str, str]:
    """By tensor its name without the block: all ``mlp.up_proj`` of a model move together."""
    return {t: match[2].removesuffix(".weight") for t in _tensors(space) if (match := BLOCK.match(t))}


def layer_labels(space: SearchSpace) -> dict[str, str]:
    """By tensor its block: a whole layer moves together."""
    return {t: match[1] for t in _tensors(space) if (match := BLOCK.match(t))}


def tied_genes(space: SearchSpace, labels: Mapping[str, str]) -> tuple[Gene, ...]:
    """One gene for each label, in the order of first members; tensors without a label stay alone.

    Formats must be legal for all of a gene's tensors, so members of other formats (rows that 256 does not divide) make
    a gene of their own.
    """
    members: dict[tuple[str, tuple[str, ...]], list[Gene]] = {}
    for gene in space.genes:
        label = labels.get(gene.tensors[0], gene.name)
        members.setdefault((label, tuple(f.name for f in gene.formats)), []).append(gene)
    names = [label for label, _ in members]
    return tuple(
        _joined(genes, label if names.count(label) == 1 else f"{label} {genes[0].formats[0].name}")
        for (label, _), genes in members.items()
    )


def _joined(genes: list[Gene], name: str) -> Gene:
    if len(genes) == 1:
        return genes[0]
    tensors = tuple(tensor for gene in genes for tensor in gene.tensors)
    shapes = tuple(shape for gene in genes for shape in gene.shapes)
    return Gene(name, tensors, shapes, genes[0].formats)


def _tensors(space: SearchSpace) -> list[str]:
    return [tensor for gene in space.genes for tensor in gene.tensors]
