"""A run ends beside llama.cpp's own file of the nearest size."""

import json
from pathlib import Path

import pytest

from bitgenome.common import layout
from bitgenome.config.run import load_config
from bitgenome.plan.plan import make_plan
from exporters.files.gguf_reader import read_gguf
from exporters.runtime.mix_file import mixes_by_size
from exporters.runtime.nearest import MOST_WEIGHTS, nearest_mix
from exporters.runtime.original import original_of


def test_the_nearest_mix_is_made_measured_and_removed(little: Path, tmp_path: Path) -> None:
    plan, run = make_plan(load_config(little / "little.yaml")), little / "little"
    best = json.loads((run / layout.BEST).read_text())
    found = best["proof"]["mix"]
    sizes = {mix.mix: mix.size for mix in mixes_by_size(original_of(plan.folder, plan.file, tmp_path / "f32.gguf"))}
    assert found["file_bytes"] == sizes[found["mix"]]
    assert abs(found["file_bytes"] - best["gguf_bytes"]) == min(
        abs(size - best["gguf_bytes"]) for size in sizes.values()
    )
    assert set(found) == {"mix", "file_bytes", "figures"} and found["figures"]["mean_kl"]["value"] > 0
    assert best["proof"]["sample"]["answer"]
    with nearest_mix("on", 1, plan.folder, plan.file, sizes["Q6_K"], run / layout.IMATRIX) as made:
        assert made is not None and made[0] == "Q6_K"
        assert made[1].stat().st_size == sizes["Q6_K"]
        types = {tensor.type_name for tensor in read_gguf(made[1]).tensors.values()}
        assert types == {"F32", "Q8_0"}  # the rows of this model divide into no K type's blocks
    assert not list(run.glob(".mix*"))


@pytest.mark.parametrize(("wanted", "weights"), [("off", 1), ("auto", MOST_WEIGHTS + 1)])
def test_none_is_made_where_it_is_not_wanted_or_takes_long(little: Path, wanted: str, weights: int) -> None:
    plan, imatrix = make_plan(load_config(little / "little.yaml")), little / "little" / layout.IMATRIX
    with nearest_mix(wanted, weights, plan.folder, plan.file, 1, imatrix) as made:
        assert made is None
