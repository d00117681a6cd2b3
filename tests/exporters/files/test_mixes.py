"""llama.cpp's own mixes and recipes, in small tables worked out by hand from its rules."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from evaluators.model.folder import ModelFolder
from exporters.files.gguf_reader import read_gguf
from exporters.files.imatrix import read_imatrix, write_imatrix
from exporters.files.mixes import DEFAULTS, MixModel, mix_name, mix_types
from exporters.files.recipe import recipe_command, recipe_lines
from exporters.opening.source import read_model
from exporters.runtime.mix_file import MixFile
from exporters.runtime.original import write_original
from quantizers.formats.table import FORMATS

PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def shapes(layers: int, columns: int = 256, tied: bool = True) -> dict[str, tuple[int, ...]]:
    blocks = {f"blk.{i}.{part}.weight": (64, columns) for i in range(layers) for part in PARTS}
    norms = {f"blk.{i}.attn_norm.weight": (columns,) for i in range(layers)}
    head = {} if tied else {"output.weight": (512, columns)}
    return {"token_embd.weight": (512, columns), **blocks, **norms, **head}


def types_of(
    mix: str, layers: int, gqa: int = 1, columns: int = 256, tied: bool = True, experts: int = 0
) -> dict[str, str]:
    model = MixModel("llama", layers, gqa, experts)
    return {name: kind.name for name, kind in mix_types(mix, shapes(layers, columns, tied), model).items()}


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        ("IQ2_XS", ["IQ2_XS", "IQ2_XS", "Q2_K", "IQ2_XS", "IQ2_XS", "IQ2_XS", "IQ2_XS"]),
        ("IQ2_M", ["IQ2_S", "IQ2_S", "IQ3_S", "IQ3_S", "IQ2_S", "IQ2_S", "IQ2_S"]),
        ("Q2_K", ["Q2_K", "Q2_K", "Q3_K", "Q3_K", "Q2_K", "Q2_K", "Q3_K"]),
        ("IQ3_XXS", ["IQ2_S", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ3_XXS", "IQ3_XXS", "IQ3_XXS"]),
        ("IQ3_XS", ["IQ3_XXS", "IQ3_XXS", "IQ3_S", "IQ3_S", "IQ3_XXS", "IQ3_XXS", "IQ3_S"]),
        ("Q3_K_M", ["Q3_K", "Q3_K", "Q4_K", "Q4_K", "Q3_K", "Q3_K", "Q4_K"]),
        ("Q3_K_L", ["Q3_K", "Q3_K", "Q5_K", "Q5_K", "Q3_K", "Q3_K", "Q5_K"]),
        ("Q4_K_M", ["Q4_K", "Q4_K", "Q4_K", "Q4_K", "Q4_K", "Q4_K", "Q4_K"]),
        ("Q8_0", ["Q8_0"] * 7),
    ],
)
def test_types_of_a_middle_block(mix: str, expected: list[str]) -> None:
    types = types_of(mix, layers=32)
    assert [types[f"blk.5.{part}.weight"] for part in PARTS] == expected


def test_a_tied_embedding_is_the_output_and_an_untied_one_is_not() -> None:
    assert types_of("Q2_K", 4)["token_embd.weight"] == "Q6_K"
    untied = types_of("Q2_K", 4, tied=False)
    assert (untied["token_embd.weight"], untied["output.weight"]) == ("Q2_K", "Q6_K")


def test_shared_values_get_more_bits() -> None:
    assert types_of("Q2_K", 4, gqa=4)["blk.0.attn_v.weight"] == "Q4_K"
    assert types_of("Q2_K", 4, gqa=3)["blk.0.attn_v.weight"] == "Q3_K"
    assert types_of("Q4_K_M", 80, gqa=8)["blk.11.attn_v.weight"] == "Q5_K"  # llama.cpp's rule for 70B
    assert types_of("Q4_K_M", 32, gqa=8, experts=8)["blk.11.attn_v.weight"] == "Q8_0"


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


def test_norms_and_routers_stay_as_they_are() -> None:
    router = {"blk.0.ffn_gate_inp.weight": (8, 256), "blk.0.ffn_down_exps.weight": (8, 64, 256)}
    types = mix_types("Q3_K_M", shapes(1) | router, MixModel("qwen3moe", 1, 1, 8))
    assert types.keys() == (shapes(1) | router).keys() - {"blk.0.attn_norm.weight", "blk.0.ffn_gate_inp.weight"}


def test_an_unknown_mix_is_refused_and_names_are_taken_as_llama_quantize_takes_them() -> None:
    assert mix_name("q4_k") == "Q4_K_M"
    with pytest.raises(ValueError, match="expected one of llama.cpp's mixes IQ1_S, .*, found Q9"):
        mix_types("Q9", {}, MixModel("llama", 1, 1))


@pytest.mark.long
@pytest.mark.skipif("LLAMA_CPP_BIN" not in os.environ, reason="needs llama-quantize, in $LLAMA_CPP_BIN")
@pytest.mark.parametrize("mix", DEFAULTS)
def test_a_mix_is_the_file_of_llama_quantize_byte_for_byte(mix: str, embedded: ModelFolder, tmp_path: Path) -> None:
    original, imatrix = tmp_path / "original.gguf", tmp_path / "imatrix.gguf"
    write_original(embedded, original)
    model = read_model(original)
    random = np.random.default_rng(0)
    importance = {n: random.random(t.shape[-1], np.float32) for n, t in model.tensors.items() if len(t.shape) > 1}
    write_imatrix(imatrix, importance, 256, 256, "random")
    command = [f"{os.environ['LLAMA_CPP_BIN']}/llama-quantize", "--imatrix", str(imatrix), str(original)]
    subprocess.run([*command, str(tmp_path / "theirs.gguf"), mix], check=True, capture_output=True)
    MixFile(model, mix).write(tmp_path / "ours.gguf", read_imatrix(imatrix))
    ours, theirs = read_gguf(tmp_path / "ours.gguf"), read_gguf(tmp_path / "theirs.gguf")
    assert {n: t.type_name for n, t in ours.tensors.items()} == {n: t.type_name for n, t in theirs.tensors.items()}
    assert [name for name in ours.tensors if not np.array_equal(ours.read(name), theirs.read(name))] == []


def test_recipe_lines_name_every_tensor_and_nothing_else() -> None:
    formats = {"token_embd.weight": FORMATS["Q6_K"], "blk.3.attn_q.weight": FORMATS["Q4_K"]}
    assert recipe_lines(formats) == [r"^token_embd\.weight$=q6_K", r"^blk\.3\.attn_q\.weight$=q4_K"]
    assert "--token-embedding-type q6_K --output-tensor-type q6_K" in recipe_command(formats)
    untied = recipe_command(formats | {"output.weight": FORMATS["Q8_0"]})
    assert "--token-embedding-type q6_K --output-tensor-type q8_0" in untied
