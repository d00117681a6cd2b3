"""Pruning in a configuration: which tensors it means, and one sentence for what cannot be."""

from typing import Any

import pytest

from bitgenome.common.errors import UserError
from bitgenome.config.quantization import PruningConfig
from bitgenome.config.run import RunConfig, parse_config
from bitgenome.plan.plan import make_plan
from bitgenome.plan.pruning import sparsity_by_tensor
from evaluators.model.folder import ModelFolder
from exporters.files.built_layout import BuiltLayout
from exporters.metadata.tensor_names import quantizable_tensors
from search.types import SearchSpace
from tests.bitgenome.conftest import SMALL
from tests.conftest import EMBEDDED
from tests.small_models import save_small_model

EMBEDDING = "model.embed_tokens.weight"


def config(pruning: dict[str, Any], **changes: Any) -> RunConfig:
    return parse_config({"name": "p", **SMALL, "quantization": {"pruning": pruning}, **changes}, "config.yaml")


def chosen(pruning: dict[str, Any]) -> dict[str, str]:
    return {name: str(sparsity) for name, sparsity in make_plan(config(pruning)).sparsity.items()}


def test_every_layer_but_the_embedding_is_pruned() -> None:
    linear = set(quantizable_tensors(ModelFolder(EMBEDDED))) - {EMBEDDING}
    assert chosen({"sparsity": 0.5}) == dict.fromkeys(linear, "0.5")
    assert chosen({"pattern": "2:4"}) == dict.fromkeys(linear, "2:4")


def test_the_first_rule_that_matches_decides() -> None:
    rules = [
        {"match": "down_proj", "sparsity": 0},
        {"match": r"layers\.0\.", "pattern": "4:8"},
        {"match": "layers|embed", "sparsity": 0.25},
    ]
    sparsity = chosen({"sparsity": 0.5, "rules": rules})
    assert "model.layers.0.mlp.down_proj.weight" not in sparsity
    assert sparsity["model.layers.0.mlp.up_proj.weight"] == "4:8"
    assert sparsity["model.layers.1.mlp.up_proj.weight"] == sparsity[EMBEDDING] == "0.25"


def test_nothing_is_pruned_by_default() -> None:
    assert make_plan(parse_config({"name": "p", **SMALL}, "config.yaml")).sparsity == {}
    assert chosen({"sparsity": 0}) == {}


@pytest.mark.parametrize(
    ("pruning", "sentence"),
    [
        (
            {"sparsity": 1.0},
            "quantization.pruning in config.yaml: expected a sparsity of at least 0 and below 1, found 1",
        ),
        ({"sparsity": -0.5}, "expected a sparsity of at least 0 and below 1, found -0.5"),
        ({"pattern": "4:2"}, "expected n of a pattern n:m from 1 to m - 1, found '4:2'"),
        ({"pattern": "2:6"}, "expected m of a pattern n:m among 2, 4, 8, 16, 32, found '2:6'"),
        ({"pattern": "two"}, 'expected a pattern "n:m" such as "2:4", n zeros in every m weights, found \'two\''),
        ({"sparsity": 0.5, "pattern": "2:4"}, "expected one of sparsity and pattern, found 0.5 and '2:4'"),
        ({"rules": [{"match": "x"}]}, "expected sparsity or pattern for match 'x', found neither"),
        ({"rules": [{"match": "(", "sparsity": 0.5}]}, r"expected a regular expression in match, found '\('"),
        ({"rules": [{"sparsity": 0.5}]}, "expected key 'quantization.pruning.rules.0.match'"),
        ({"sparsty": 0.5}, r"unknown key .* did you mean quantization.pruning.sparsity\?"),
        (
            {"rules": [{"mtch": "x", "match": "x", "sparsity": 0.1}]},
            r"did you mean quantization.pruning.rules.0.match\?",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_a_bad_value_is_answered_with_a_valid_one(pruning: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as refusal:
        config(pruning)
    assert "\n" not in str(refusal.value)


def test_a_rule_for_no_tensor_names_some() -> None:
    with pytest.raises(UserError, match=r"tensor's name, such as model.embed_tokens.weight, .*, found 'lm_head'"):
        make_plan(config({"rules": [{"match": "lm_head", "sparsity": 0.5}]}))


def test_rows_that_the_pattern_does_not_divide_are_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = save_small_model(tmp_path_factory.mktemp("odd"), "llama", intermediate_size=90, tokenizer=False)
    file = BuiltLayout(ModelFolder(path), allow_missing_tokenizer=True)
    space = SearchSpace.per_tensor(file.shapes, ["W4"], 0)
    with pytest.raises(UserError, match=r"m divides rows of 90 weights, found 2:4, in model.layers.0.mlp.down_proj"):
        sparsity_by_tensor(PruningConfig(pattern="2:4"), file.kinds, space)
    assert len(sparsity_by_tensor(PruningConfig(sparsity=0.5), file.kinds, space)) == 14
