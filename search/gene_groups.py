"""Groups of genes: tensors of one group share a gene and take the same format, which makes the genome shorter."""

import re
from collections.abc import Mapping

from search.types import Gene, SearchSpace

BLOCK = re.compile(r"^(.*?\.\d+)\.(.*)$")  # "model.layers.3", "mlp.up_proj.weight"


def kind_labels(space: SearchSpace) -> dict[str, str]:
    """Map each tensor of a block to its name without the block: all ``mlp.up_proj`` of a model form one group."""
    return {t: match[2].removesuffix(".weight") for t in _tensors(space) if (match := BLOCK.match(t))}


def layer_labels(space: SearchSpace) -> dict[str, str]:
    """Map each tensor of a block to the name of the block: all tensors of a layer form one group."""
    return {t: match[1] for t in _tensors(space) if (match := BLOCK.match(t))}


def tied_genes(space: SearchSpace, labels: Mapping[str, str]) -> tuple[Gene, ...]:
    """Return one gene per label, in the order of their first members; a tensor without a label keeps its own gene.

    ``labels`` maps tensor names to labels. The formats of a gene must be legal for all of its tensors, so members of a
    group that have other formats (rows that 256 does not divide) form a gene of their own.
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
    """Return one gene of this name for all tensors of ``genes``, or the gene itself if there is only one."""
    if len(genes) == 1:
        return genes[0]
    tensors = tuple(tensor for gene in genes for tensor in gene.tensors)
    shapes = tuple(shape for gene in genes for shape in gene.shapes)
    return Gene(name, tensors, shapes, genes[0].formats)


def _tensors(space: SearchSpace) -> list[str]:
    return [tensor for gene in space.genes for tensor in gene.tensors]
