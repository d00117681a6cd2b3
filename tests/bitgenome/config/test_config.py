"""Configurations: what ships loads, overrides apply, the digest is that of the result."""

from pathlib import Path

import pytest
import yaml

from bitgenome.cli.plan_view import searched
from bitgenome.common.errors import UserError
from bitgenome.config.export import shard_size
from bitgenome.config.file import load_yaml
from bitgenome.config.run import load_config, parse_config
from bitgenome.plan.plan import make_plan
from bitgenome.plan.seeds import check_seeds
from search.strategies.settings import GeneticSettings
from tests.bitgenome.conftest import Runs
from tests.conftest import REPOSITORY

FILES = sorted((REPOSITORY / "configs").rglob("*.yaml"))
CONFIGS = [path for path in FILES if not path.name.startswith("study-") and path.parent.name != "batch"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_in_the_repository_can_be_planned(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    plan = make_plan(load_config(path))
    assert plan.space.file_bytes(plan.space.smallest()) <= plan.budget.file_bytes
    check_seeds(plan)


def test_overrides_are_yaml_and_replace_the_kind_of_budget(runs: Runs) -> None:
    path = runs.write("overrides")
    config = load_config(path, ["search.generations=20", "budget.file_size=3 MB", "levels=[W2, W8]"])
    assert (config.search.generations, config.budget.file_size) == (20, "3 MB")
    assert config.budget.bits_per_weight is None
    assert config.levels == ("W2", "W8")


def test_a_key_may_be_given_once_and_taken_over_from_an_anchor() -> None:
    text = "x: {a: &a {<<: &c {k: 1, m: 3}, k: 2}}\nb: {<<: *a, k: 4}\n"
    assert load_yaml(text) == {"x": {"a": {"k": 2, "m": 3}}, "b": {"k": 4, "m": 3}}
    for twice in ("{k: 1, k: 2}", "a: {b: [{k: 1}, {k: 1, k: 1}]}"):
        with pytest.raises(yaml.YAMLError, match="the key 'k' in line 1 and again in line 1: give it once"):
            load_yaml(twice)


def test_an_override_without_a_value_is_refused(runs: Runs) -> None:
    with pytest.raises(UserError, match="expected --set KEY=VALUE, found 'search.seed'"):
        load_config(runs.write("overrides"), ["search.seed"])


def test_healing_takes_on_and_off_as_yaml_reads_them_and_its_loss_decides_the_temperature(runs: Runs) -> None:
    path = runs.write("healing")
    assert [load_config(path, [f"healing.enabled={v}"]).healing.enabled for v in ("on", "off", "auto")] == [
        "on", "off", "auto",
    ]  # fmt: skip
    kl, mix = (load_config(path, [f"healing.loss={loss}"]).healing for loss in ("kl", "distillation"))
    assert (kl.chosen_temperature, kl.chosen_alpha) == (1.0, 0.0)
    assert (mix.chosen_temperature, mix.chosen_alpha) == (4.0, 0.3)
    assert load_config(path, ["healing.steps=7"]).digest != load_config(path).digest


def test_the_digest_ignores_where_a_run_is_computed(runs: Runs) -> None:
    path = runs.write("digest")
    digest = load_config(path).digest
    assert load_config(path, ["workers.count=7", "storage_path=elsewhere", "name=other"]).digest == digest
    assert load_config(path, ["export.split_max_size=4G"]).digest == digest
    assert load_config(path, ["search.seed=1"]).digest != digest


def test_a_size_of_shards_is_llama_cpps_or_ours() -> None:
    assert shard_size("4G") == shard_size("4GB") == 4 * 10**9 and shard_size("300M") == 300 * 10**6
    for given in ("many", "0"):
        with pytest.raises(ValueError, match="size"):
            shard_size(given)


def test_defaults_of_the_search_are_those_of_the_genetic_strategy(runs: Runs) -> None:
    config = parse_config({"name": "x", "model": "m", "budget": {"bits_per_weight": 3}}, "here").search
    assert config.model_dump(include=set(GeneticSettings.model_fields)) == GeneticSettings().model_dump()


@pytest.mark.parametrize(("word", "count"), [("classic", 3), ("fine", 6), ("all", 13)])
def test_a_word_stands_for_several_levels(word: str, count: int) -> None:
    config = parse_config({"name": "x", "model": "m", "budget": {"bits_per_weight": 3}, "levels": word}, "here")
    assert len(config.levels) == count


def test_levels_go_by_their_gguf_types_too_in_any_case() -> None:
    base = {"name": "x", "model": "m", "budget": {"bits_per_weight": 3}}
    named = parse_config({**base, "levels": ["Q2_K", "w4", "q6_k", "iq4_nl"]}, "here")
    assert named.levels == ("W2", "W4", "W6", "IQ4_NL")
    assert named.digest == parse_config({**base, "levels": ["W2", "W4", "W6", "IQ4_NL"]}, "here").digest
    with pytest.raises(UserError, match=r"expected levels among W2 \(Q2_K\), .*, found Q4_0"):
        parse_config({**base, "levels": ["Q4_0"]}, "here")
    with pytest.raises(UserError, match="expected one or more different levels, found W4, q4_k"):
        parse_config({**base, "levels": ["W4", "q4_k"]}, "here")


def test_an_unknown_word_for_levels_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="expected a list of levels or one of classic, fine, all, found finest"):
        parse_config({"name": "x", "model": "m", "budget": {"bits_per_weight": 3}, "levels": "finest"}, "here")


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"ladder": [512, 9000]}, r"expected search.ladder of 0 or from text.window \(512\) to text.tokens.search"),
        ({"ladder": [100, 1024]}, r"text.tokens.search \(8192\) tokens, found \[100, 1024\]"),
        ({"ladder": [1024, 1024]}, r"expected rungs of tokens that rise from at least 0, found \[1024, 1024\]"),
        ({"ladder": [0]}, r"expected rungs of tokens that rise"),
        ({"refresh": 2}, r"expected search.ladder to end below text.tokens.search \(8192\)"),
        ({"ladder": [1024], "refresh": 2, "strategy": "optuna"}, "expected refresh 0 with strategy optuna"),
        ({"promotion": 1.0, "ladder": [512, 1024]}, "promotion"),
    ],
)
def test_a_ladder_that_the_text_cannot_serve_is_refused_in_one_sentence(search: dict, message: str) -> None:
    data = {"name": "x", "model": "m", "budget": {"bits_per_weight": 3}, "search": search}
    with pytest.raises(UserError, match=message) as error:
        parse_config(data, "here")
    assert "\n" not in str(error.value)


def test_without_a_ladder_the_search_reads_all_of_its_text(runs: Runs) -> None:
    config = load_config(runs.write("one-rung"))
    assert config.ladder.rungs == (config.text.tokens.search,)
    rungs = load_config(runs.write("rungs"), ["search.ladder=[0, 256, 512]", "search.promotion=0.3"]).ladder
    assert (rungs.rungs, rungs.promotion, rungs.seed) == ((0, 256, 512), 0.3, config.search.seed)


def test_a_plan_counts_evaluations_by_rung_and_those_of_elites_on_new_text(runs: Runs) -> None:
    changes = ["search.ladder=[0, 256, 512]", "text.tokens.search=1024", "search.population=10", "search.generations=6"]
    plan = make_plan(load_config(runs.write("counted"), [*changes, "search.refresh=2", "search.elites=3"]))
    assert plan.search_rungs == [(0, 60), (256, 30), (512, 6 * 3 + 2 * 3)]
    assert searched(plan.search_rungs) == "60 evaluations of 0, 30 of 256, 24 of 512 tokens"
    plain = make_plan(load_config(runs.write("plain")))
    assert searched(plain.search_rungs) == "24 evaluations of 512 tokens"


@pytest.mark.parametrize("name", ["shared", "Shared"])
def test_the_name_of_what_runs_share_is_no_runs(tmp_path: Path, name: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"name: {name}\nmodel: m\nbudget: {{bits_per_weight: 3}}\n")
    with pytest.raises(UserError, match=f"expected a name other than '{name}', where runs keep what they share"):
        load_config(path)
