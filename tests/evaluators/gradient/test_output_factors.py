"""Output factors: against sums of all positions at once, resumed after an interruption, and of every expert."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bitgenome.common.digests import digest_of_file
from bitgenome.common.errors import UserError
from evaluators.data.windows import TokenWindows
from evaluators.gradient import output_factors
from evaluators.gradient.label_scores import LinearUse, model_scores
from evaluators.gradient.output_factors import MeasureOutputs, Pass
from evaluators.gradient.sensitivity import label_draws
from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder
from evaluators.prepare.output_factor import factor_file, factor_readable, load_factor, tensor_of
from quantizers.rounding import row_order
from quantizers.statistics.hessian import damped
from quantizers.statistics.output_damping import DAMPINGS
from tests.small_models import save_small_model

WORDS = 64


def measured(path: Path, model_type: str = "qwen2", **settings: Any) -> MeasureOutputs:
    folder = save_small_model(path / "model", model_type, tokenizer=False, vocab_size=WORDS, **settings)
    text = torch.randint(0, WORDS, (6, 16), generator=torch.Generator().manual_seed(2)).numpy()
    (path / "windows").write_bytes(TokenWindows({"calibration": text}, "digest", unscored=2).to_bytes())
    model = BlockModel(ModelFolder(folder), torch.device("cpu"))
    names = frozenset(name for block in range(len(model.blocks)) for name, _ in model.linears(block))
    (path / "outputs").mkdir()
    return MeasureOutputs(folder, path / "windows", path / "outputs", names)


def test_a_factor_is_the_damped_mean_over_all_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_factors, "PART_TOKENS", 32)
    task = measured(tmp_path)
    assert task.run({}) == sorted(task.tensors)
    model = BlockModel(ModelFolder(task.model), torch.device("cpu"))
    model.load_all()
    ids = torch.from_numpy(TokenWindows.load(task.windows).windows["calibration"])
    uses = [use for use in model_scores(model, ids, label_draws(0, *ids.shape), 2) if use.name in task.tensors]
    for use in uses:
        assert isinstance(use, LinearUse)
        g, x = use.scores.double(), use.inputs.double()
        expected = torch.einsum("pi,pj,p->ij", g, g, x.square().sum(1)) / len(g)
        found = load_factor(factor_file(task.directory, use.name))[0].double()
        damping = float((found - expected).diagonal().mean() / expected.diagonal().mean())
        assert min(abs(damping / one - 1) for one in DAMPINGS) < 1e-3, damping
        assert torch.allclose(found, damped(expected, damping), rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert {tensor_of(file) for file in task.directory.iterdir()} == task.tensors, "no state is left"


@pytest.mark.parametrize("fails_at", [("_forward", 0), ("_block", 1), ("_block", 0)])
def test_an_interrupted_pass_goes_on_to_the_same_bytes(
    fails_at: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole, cut = measured(tmp_path / "whole"), measured(tmp_path / "cut")
    whole.run({})
    where, block = fails_at
    run_block, read = BlockModel.run_block, Pass._block
    with monkeypatch.context() as patched:

        def stop(self: Any, at: int, *arguments: Any) -> Any:
            if at == block:
                raise KeyboardInterrupt
            return (run_block if where == "_forward" else read)(self, at, *arguments)

        patched.setattr(*((BlockModel, "run_block") if where == "_forward" else (Pass, "_block")), stop)
        with pytest.raises(KeyboardInterrupt):
            cut.run({})
    assert list(cut.directory.glob("*-*.safetensors")), "states to go on from"
    assert cut.run({}) == sorted(cut.tensors)
    for name in cut.tensors:
        files = [factor_file(task.directory, name) for task in (whole, cut)]
        assert len({digest_of_file(file) for file in files}) == 1


def test_every_expert_has_a_factor_that_leans_on_all(tmp_path: Path) -> None:
    task = measured(tmp_path, "mixtral")
    assert task.run({}) == sorted(task.tensors)
    experts = [load_factor(factor_file(task.directory, name)) for name in task.tensors if "experts" in name]
    assert experts
    assert all(factor.isfinite().all() and factor.diagonal(0, 1, 2).sum() > 0 for factor in experts)


def test_many_rows_have_a_factor_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_order, "MOST_ROWS", 16)
    task = measured(tmp_path)
    task.run({})
    shapes = ModelFolder(task.model).shapes
    for name in task.tensors:
        blocks, r, _ = load_factor(factor_file(task.directory, name)).shape
        assert blocks * r == shapes[name][0] and r <= 16


def test_a_cut_file_is_no_factor(tmp_path: Path) -> None:
    task = measured(tmp_path)
    name = task.run({})[0]
    file = factor_file(task.directory, name)
    assert factor_readable(file)
    file.write_bytes(file.read_bytes()[:40])
    assert not factor_readable(file)
    with pytest.raises(UserError, match="expected an output factor in .*, found .*: the next attempt measures it"):
        load_factor(file)
