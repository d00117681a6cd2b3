"""Tied genes: one for each label, legal for all members, nothing lost."""

from search.gene_groups import kind_labels, layer_labels, tied_genes
from search.types import SearchSpace

SHAPES = {
    "model.embed_tokens.weight": (512, 256),
    "model.layers.0.self_attn.q_proj.weight": (256, 256),
    "model.layers.0.mlp.down_proj.weight": (256, 512),
    "model.layers.1.self_attn.q_proj.weight": (256, 256),
    "model.layers.1.mlp.down_proj.weight": (256, 512),
}
SPACE = SearchSpace.per_tensor(SHAPES, ("W2", "W4", "W8"), 1000, 7)


def test_genes_are_tied_by_kind_and_by_layer_and_the_ends_stay_alone() -> None:
    kinds = {gene.name: gene.tensors for gene in tied_genes(SPACE, kind_labels(SPACE))}
    assert kinds == {
        "model.embed_tokens.weight": ("model.embed_tokens.weight",),
        "self_attn.q_proj": tuple(f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)),
        "mlp.down_proj": tuple(f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)),
    }
    layers = [gene.name for gene in tied_genes(SPACE, layer_labels(SPACE))]
    assert layers == ["model.embed_tokens.weight", "model.layers.0", "model.layers.1"]


def test_a_tied_genome_has_the_size_of_the_free_one_with_the_same_formats() -> None:
    genes = tied_genes(SPACE, layer_labels(SPACE))
    tied = SearchSpace(genes, SPACE.fixed_bytes, SPACE.fixed_weights)
    assert tied.weights == SPACE.weights
    assert tied.file_bytes((1, 0, 2)) == SPACE.file_bytes((1, 0, 0, 2, 2))


def test_members_of_other_formats_make_a_gene_of_their_own() -> None:
    shapes = {**SHAPES, "model.layers.1.mlp.down_proj.weight": (256, 96)}
    space = SearchSpace.per_tensor(shapes, ("W2", "W4", "W8"), 1000)
    genes = tied_genes(space, dict.fromkeys(shapes, "all"))
    assert [gene.name for gene in genes] == ["all Q2_K", "model.layers.1.mlp.down_proj.weight"]
    assert [len(gene.tensors) for gene in genes] == [4, 1]
    for gene in genes:
        assert all(f.fits(shape[-1]) for f in gene.formats for shape in gene.shapes)
