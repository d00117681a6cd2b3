"""A search starts from somebody's mix: a recipe, or what another run has found."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bitgenome.common import layout
from bitgenome.common.errors import UserError
from bitgenome.config.run import RunConfig, absolute_paths, load_config
from bitgenome.plan.plan import Plan, make_plan
from bitgenome.plan.seeds import check_seeds, read_mix, starting_genomes
from bitgenome.run.sensitivities import table_of
from bitgenome.storage.run_directory import RunDirectory
from tests.bitgenome.conftest import Runs, call_here


def planned(runs: Runs, seeds: Any, **changes: Any) -> Plan:
    path = runs.write("seeded", search={"seeds": seeds}, **changes)
    return make_plan(load_config(path), weights=False)


@pytest.mark.usefixtures("finished")
def test_the_recipe_of_a_run_and_the_run_itself_give_its_winner(runs: Runs, tmp_path: Path) -> None:
    recipe = runs.storage / "base" / layout.RECIPE
    plan = planned(runs, [str(recipe), "base"])
    winner = tuple(runs.best("base")["winner"]["genome"])
    table = table_of(plan.space, pd.read_parquet(runs.storage / "base" / layout.SENSITIVITY), "kl")
    found = starting_genomes(plan, table)
    assert found.named == {"from recipe.txt": winner, "from base": winner}
    assert 1 <= len(found.others) <= 8 and winner not in found.others
    assert all(plan.space.file_bytes(genome) <= plan.budget.file_bytes for genome in found.others)
    partial = tmp_path / "partial.txt"  # a few lines, as people publish them
    partial.write_text("ffn_down=q6_K\n")
    mix = read_mix(planned(runs, str(partial)), str(partial))
    kinds = {name: fmt.name for name, fmt in plan.space.formats_of(mix.genome).items()}
    assert {kind for name, kind in kinds.items() if "down_proj" in name} == {"Q6_K"}
    assert {kind for name, kind in kinds.items() if "down_proj" not in name} == {"Q3_K"}
    other = planned(runs, "base", levels=["W2", "W3", "W4", "W5", "W6"], budget={"bits_per_weight": 3.5})
    mix = read_mix(other, "base")
    assert {n: f.name for n, f in other.space.formats_of(mix.genome).items()} == runs.best("base")["formats"]


@pytest.mark.usefixtures("finished")
@pytest.mark.parametrize(
    ("recipe", "changes", "found"),
    [
        ("blk.0.attn_q=q8_0", {}, "in line 1 of {}, found Q8_0: add it to levels"),
        ("token_embd=q6_K\n\nblk.77.attn_q=q4_K", {}, "in line 3 of {}, found 'blk.77.attn_q=q4_K'"),
        ("token_embd", {}, "in line 1 of {}, found 'token_embd'"),
        (
            "blk.0.attn_q=q4_K\nblk.1.attn_q=q2_K",
            {"gene_groups": {"by": "kind"}},
            "self_attn.q_proj in {}, found Q4_K in line 1 and Q2_K in line 2",
        ),
        (None, {}, "found neither at"),
    ],
)
def test_a_mix_that_cannot_be_used_is_refused_before_any_work(
    runs: Runs, tmp_path: Path, recipe: str | None, changes: dict[str, Any], found: str
) -> None:
    file = tmp_path / "mix.txt"
    if recipe:
        file.write_text(recipe)
    path = runs.write("refused", search={"seeds": str(file), **changes})
    done = call_here("run", path)
    assert done.returncode == 2 and found.format(file) in done.stderr.replace("\n", ""), done.stderr
    assert not (runs.storage / "refused").exists()


@pytest.mark.usefixtures("finished")
def test_a_run_of_other_levels_or_without_evaluations_is_refused(runs: Runs) -> None:
    with pytest.raises(UserError, match="found W2, W3 there alone"):
        check_seeds(planned(runs, "base", levels=["W4", "W6"], budget={"bits_per_weight": 5.0}))
    empty = runs.storage / "empty"
    empty.mkdir()
    shutil.copy(runs.storage / "base" / layout.RECORD, empty)
    with pytest.raises(UserError, match="found none in"):
        check_seeds(planned(runs, "empty"))
    shutil.rmtree(empty)


@pytest.mark.usefixtures("finished")
def test_seeds_count_by_name_for_what_a_run_is(runs: Runs) -> None:
    config = RunDirectory.open(runs.storage / "base").config
    assert config.search.seeds == () and "seeds" not in config.result_keys()["search"]
    search = config.search.model_copy(update={"seeds": (str(runs.storage / "base"),)})
    seeded: RunConfig = absolute_paths(config.model_copy(update={"search": search}))
    assert seeded.result_keys()["search"]["seeds"] == ["base"] and seeded.digest != config.digest
