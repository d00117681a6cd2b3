"""Recipes are read as llama-quantize reads them: the first expression that finds a name counts."""

import pytest

from bitgenome.common.errors import UserError
from exporters.files.recipe import chosen_types, read_recipe, recipe_lines
from quantizers.formats.table import FORMATS

NAMES = ["token_embd.weight", "blk.0.ffn_down.weight", "blk.1.ffn_down.weight", "blk.1.attn_q.weight"]


def test_what_is_written_is_read_back() -> None:
    formats = {name: FORMATS[kind] for name, kind in zip(NAMES, ("Q6_K", "Q4_K", "IQ3_S", "Q8_0"), strict=True)}
    found = chosen_types(read_recipe("\n".join(recipe_lines(formats)), "r"), NAMES, "r")
    assert {name: chosen.type_name for name, chosen in found.items()} == {n: f.name for n, f in formats.items()}


def test_the_first_entry_that_finds_a_name_counts_and_a_line_may_hold_several() -> None:
    entries = read_recipe("# mine\n\nBLK\\.1\\.=q8_0 ffn_down=Q3_K\nblk\\.0\\.=q6_K\n", "r")
    found = chosen_types(entries, NAMES, "r")
    assert {name: (chosen.type_name, chosen.line) for name, chosen in found.items()} == {
        "blk.0.ffn_down.weight": ("Q3_K", 3), "blk.1.ffn_down.weight": ("Q8_0", 3), "blk.1.attn_q.weight": ("Q8_0", 3),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ffn_down", "line 1 of r, found 'ffn_down'"),
        ("ffn_down=q4_K\nffn_up=Q4_K_M", "line 2 of r, found 'Q4_K_M'"),
        ("ffn_(down=q4_K", "line 1 of r, found 'ffn_("),
        ("# nothing", "in r, found none"),
        ("ffn_down=q4_K\n\nblk\\.7\\.=q4_K", "line 3 of r, found 'blk"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(text: str, found: str) -> None:
    with pytest.raises(UserError) as refused:
        chosen_types(read_recipe(text, "r"), NAMES, "r")
    assert found in str(refused.value)
