"""What a run begins with where a user says nothing but a model and a size."""

import os
import shutil
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from bitgenome.common import layout
from bitgenome.common.errors import UserError
from bitgenome.config.run import RunConfig, load_config
from bitgenome.plan.plan import Plan, free_space
from bitgenome.quantize.begin import Beginning, begin
from bitgenome.quantize.commented import commented_yaml
from bitgenome.quantize.effort import EFFORTS
from bitgenome.quantize.request import Request
from bitgenome.quantize.size import WantedSize
from bitgenome.quantize.text import text_settings
from evaluators.model.folder import ModelFolder
from evaluators.probes.rates import Rates, RoundingRate
from exporters.files.built_layout import BuiltLayout
from exporters.runtime.converter import VARIABLE, find_converter
from quantizers.formats.table import LEVEL_PRESETS
from tests.conftest import EMBEDDED, REPOSITORY
from tests.small_models import save_small_model

HOUR = 3600.0
WRAPPER = REPOSITORY / "benchmarks" / "models" / "convert.py"  # it knows the embedded vocabulary
RATES = Rates(
    device="one of constant rates", threads=1, block=1e-5, block_float32=1e-5, block_gradient=3e-5, head=1e-5,
    head_gradient=3e-5, block_calibration=1e-5, hessian=defaultdict(lambda: 1e-6), factor=1e-10,
    rounding=defaultdict(lambda: RoundingRate(1e-4, 1e-8, 1024)), decode=1e-9, host_flops=1e10, written=1e-5,
)  # fmt: skip


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen here does not depend on how busy this machine is; a whole run's probes are real ones."""
    monkeypatch.setattr("bitgenome.quantize.begin.rates_here", lambda plan: RATES)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model") / "small", "llama", hidden_size=256)


def asked(tmp_path: Path, model: Path, **changes: object) -> Beginning:
    request = Request(str(model), WantedSize(bits=6.0), HOUR, storage=str(tmp_path / "runs"))
    return begin(replace(request, **changes))  # type: ignore[arg-type]


def test_the_yaml_is_read_as_the_run_that_was_chosen_and_explains_every_setting(tmp_path: Path, small: Path) -> None:
    found = asked(tmp_path, small, overrides=("search.population=6", "fitness.kl_weight=2"))
    text = commented_yaml(found.settings, ["bitgenome init", "", "a note"])
    (tmp_path / "run.yaml").write_text(text)
    assert load_config(tmp_path / "run.yaml") == found.config
    assert (found.config.search.population, found.config.fitness.kl_weight) == (6, 2.0)
    lines = text.splitlines()
    settings = [n for n, line in enumerate(lines) if line.strip() and not line.strip().startswith("#")]
    assert len(settings) > 20 and all(lines[n - 1].strip().startswith("#") for n in settings)
    assert f"# {RunConfig.model_fields['budget'].description}" in lines
    assert not (tmp_path / "runs").exists()  # nothing but a choice so far


def test_less_time_means_less_text_and_less_search(tmp_path: Path, small: Path) -> None:
    most, least = asked(tmp_path, small, seconds=1e9), asked(tmp_path, small, seconds=1.0)
    assert most.config.text.tokens.calibration == EFFORTS[0].calibration > EFFORTS[-1].calibration
    assert least.config.text.tokens.calibration == EFFORTS[-1].calibration
    assert (most.config.search.strategy, least.config.search.strategy) == ("genetic", "exact")
    assert "nothing is forecast to end within 1 s" in dict(least.notes)["effort"]
    asked_for = asked(tmp_path, small, seconds=1.0, strategy="optuna").config.search
    assert asked_for.strategy == "optuna" and asked_for.evaluations < most.config.search.evaluations


def test_what_takes_more_memory_than_there_is_gives_way(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def heavy(plan: Plan, stages: object) -> list[str]:
        return ["search"] if plan.config.search.strategy == "genetic" else []

    monkeypatch.setattr("bitgenome.quantize.effort.too_large", heavy)
    assert dict(asked(tmp_path, small, seconds=1e9).notes)["effort"].startswith("solved: ")


def test_efforts_fall_from_the_most_to_the_least() -> None:
    sizes = [(e.calibration, e.sensitivity, e.search, e.validation, e.test) for e in EFFORTS]
    assert all(a >= b for left, right in pairwise(sizes) for a, b in zip(left, right, strict=True))
    evaluations = [effort.population * effort.generations for effort in EFFORTS]
    assert evaluations == sorted(evaluations, reverse=True)


def test_a_size_below_what_k_types_reach_takes_codebook_types_too(tmp_path: Path, small: Path) -> None:
    assert "IQ2_XXS" not in asked(tmp_path, small).config.levels
    folder = ModelFolder(small)
    space = free_space(BuiltLayout(folder), folder, LEVEL_PRESETS["fine"])
    little = asked(tmp_path, small, size=WantedSize(size=str(space.file_bytes(space.smallest()) - 1)))
    assert "IQ2_XXS" in little.config.levels and little.settings["levels"] == "all"
    with pytest.raises(UserError, match="budget of size 1KB .* cannot be met: this model's files lie between"):
        asked(tmp_path, small, size=WantedSize(size="1KB"))
    with pytest.raises(UserError, match="budget of 32 bits per weight .* cannot be met"):
        asked(tmp_path, small, size=WantedSize(bits=32))
    assert asked(tmp_path, small, overrides=("levels=[q4_k, Q8_0]",)).config.levels == ("W4", "W8")


def test_text_is_the_users_else_the_models_own(tmp_path: Path, small: Path) -> None:
    alone = asked(tmp_path, small)
    assert alone.config.text.source == "self"
    assert alone.config.text.window == 256  # all of the model's context
    assert text_settings(None, ModelFolder(EMBEDDED))[0]["source"] == "stdlib"  # held out of what it was trained on

    short = tmp_path / "short.txt"
    short.write_text("".join(f"line {number} of a text\n" for number in range(4000)))
    given = asked(tmp_path, small, text=short)
    tokens = given.config.text.tokens
    assert given.config.text.path == short and 256 <= tokens.test < tokens.calibration < 80_000
    assert "no more in " in given.notes[-1][1] and f"{tokens.calibration:,} for calibration" in given.notes[-1][1]
    short.write_text("too short\n" * 20)
    with pytest.raises(UserError, match=r"expected at least \d+ tokens of"):
        asked(tmp_path, small, text=short)
    with pytest.raises(UserError, match="expected a text file for --text, found none at none.txt"):
        asked(tmp_path, small, text=Path("none.txt"))


def test_a_model_without_an_export_names_the_command_that_makes_its_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BITGENOME_CONVERTER", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    model = save_small_model(tmp_path / "gemma", "gemma2")
    with pytest.raises(UserError, match="a template serves other models: bitgenome convert .*gemma makes one"):
        asked(tmp_path, model)
    with pytest.raises(UserError, match="expected llama.cpp's convert_hf_to_gguf.py, found no file at"):
        asked(tmp_path, model, converter=tmp_path)


@pytest.mark.skipif(not os.environ.get(VARIABLE), reason="llama.cpp's converter is not there")
def test_a_template_is_made_once_and_kept_for_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(find_converter(None).parent))
    model = save_small_model(tmp_path / "moe", "qwen3_moe", tokenizer=False, vocab_size=4096, num_experts=4)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED / name, model / name)
    found = asked(tmp_path, model, converter=WRAPPER)
    template = found.config.template
    assert template and str(template) in dict(found.notes)["template"]
    written = template.stat().st_mtime_ns
    run = tmp_path / "runs" / found.config.name
    run.mkdir()
    assert asked(tmp_path, model, converter=WRAPPER).config.template == template
    assert template.stat().st_mtime_ns == written
    assert f"template/{template.parent.name}" in (run / layout.USED).read_text().split()  # prune keeps it
