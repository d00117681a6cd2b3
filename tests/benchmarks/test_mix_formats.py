"""llama.cpp's own mixes and recipes, in small tables worked out by hand from its rules."""

import pytest

from benchmarks.mix_formats import llamacpp_mix
from exporters.files.recipe import recipe_command, recipe_lines
from quantizers.formats.table import FORMATS

PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def shapes(layers: int, columns: int = 256, tied: bool = True) -> dict[str, tuple[int, ...]]:
    blocks = {f"blk.{i}.{part}.weight": (64, columns) for i in range(layers) for part in PARTS}
    head = {} if tied else {"output.weight": (512, columns)}
    return {"token_embd.weight": (512, columns), **blocks, **head}


def types_of(mix: str, layers: int, gqa: int = 1, columns: int = 256, tied: bool = True) -> dict[str, str]:
    return {name: f.name for name, f in llamacpp_mix(mix, shapes(layers, columns, tied), layers, gqa).items()}


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        ("Q2_K", ["Q2_K", "Q2_K", "Q3_K", "Q3_K", "Q2_K", "Q2_K", "Q3_K"]),
        ("Q3_K_M", ["Q3_K", "Q3_K", "Q4_K", "Q4_K", "Q3_K", "Q3_K", "Q4_K"]),
        ("Q4_K_M", ["Q4_K", "Q4_K", "Q4_K", "Q4_K", "Q4_K", "Q4_K", "Q4_K"]),
    ],
)
def test_types_of_a_middle_block(mix: str, expected: list[str]) -> None:
    types = types_of(mix, layers=32)
    assert [types[f"blk.5.{part}.weight"] for part in PARTS] == expected


def test_a_tied_embedding_is_the_output_and_an_untied_one_is_not() -> None:
    assert types_of("Q2_K", 4)["token_embd.weight"] == "Q6_K"
    untied = types_of("Q2_K", 4, tied=False)
    assert (untied["token_embd.weight"], untied["output.weight"]) == ("Q2_K", "Q6_K")


def test_q2_k_gives_shared_values_more_bits() -> None:
    assert types_of("Q2_K", 4, gqa=4)["blk.0.attn_v.weight"] == "Q4_K"
    assert types_of("Q2_K", 4, gqa=3)["blk.0.attn_v.weight"] == "Q3_K"


def test_q4_k_m_gives_more_bits_to_the_ends_and_every_third_block_between() -> None:
    types = types_of("Q4_K_M", 32)
    wide = [i for i in range(32) if types[f"blk.{i}.ffn_down.weight"] == "Q6_K"]
    assert wide == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]


def test_q3_k_m_gives_more_bits_to_the_first_blocks() -> None:
    types = types_of("Q3_K_M", 32)
    assert [types[f"blk.{i}.attn_v.weight"] for i in range(3)] == ["Q5_K", "Q5_K", "Q4_K"]
    assert [types[f"blk.{i}.ffn_down.weight"] for i in range(3)] == ["Q5_K", "Q5_K", "Q4_K"]


def test_rows_that_do_not_divide_fall_back_as_in_llamacpp() -> None:
    assert set(types_of("Q2_K", 4, columns=96).values()) == {"Q4_0", "Q8_0"}
    assert set(types_of("Q4_K_M", 16, columns=96).values()) == {"Q5_0", "Q8_0"}
    assert set(types_of("Q2_K", 4, columns=172).values()) == {"F16"}


def test_an_unknown_mix_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of Q2_K, Q3_K_M, Q4_K_M, found 'IQ2_XS'"):
        llamacpp_mix("IQ2_XS", {}, 1, 1)


def test_recipe_lines_name_every_tensor_and_nothing_else() -> None:
    formats = {"token_embd.weight": FORMATS["Q6_K"], "blk.3.attn_q.weight": FORMATS["Q4_K"]}
    assert recipe_lines(formats) == [r"^token_embd\.weight$=q6_K", r"^blk\.3\.attn_q\.weight$=q4_K"]
    assert "--token-embedding-type q6_K --output-tensor-type q6_K" in recipe_command(formats)
    untied = recipe_command(formats | {"output.weight": FORMATS["Q8_0"]})
    assert "--token-embedding-type q6_K --output-tensor-type q8_0" in untied
