"""Output factors: against sums of all positions at once, resumed after an interruption, and of every expert."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bitgenome.common.digests import digest_of_file
from bitgenome.common.errors import UserError
from evaluators.data.windows import TokenWindows
from evaluators.gradient import output_factors
from evaluators.gradient.label_scores import LinearUse, LookupUse, model_scores
from evaluators.gradient.output_factors import MeasureOutputs, Pass
from evaluators.gradient.sensitivity import label_draws
from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder
from evaluators.prepare.output_factor import factor_file, factor_readable, load_factor, tensor_of
from evaluators.prepare.row_hessians import load_sums, summed_tensor, sums_name
from quantizers.rounding import row_order
from quantizers.statistics import row_groups
from quantizers.statistics.hessian import damped
from quantizers.statistics.output_damping import DAMPINGS
from quantizers.statistics.row_groups import RowAccumulator
from tests.small_models import save_small_model

WORDS = 64


def measured(path: Path, model_type: str = "qwen2", *, rows: bool = False, **settings: Any) -> MeasureOutputs:
    folder = save_small_model(path / "model", model_type, tokenizer=False, vocab_size=WORDS, **settings)
    text = torch.randint(0, WORDS, (6, 16), generator=torch.Generator().manual_seed(2)).numpy()
    (path / "windows").write_bytes(TokenWindows({"calibration": text}, "digest", unscored=2).to_bytes())
    model = BlockModel(ModelFolder(folder), torch.device("cpu"))
    names = {name for block in range(len(model.blocks)) for name, _ in model.linears(block)}
    names |= {model.head_name, *model.lookup_names} if rows else set()
    (path / "outputs").mkdir()
    return MeasureOutputs(folder, path / "windows", path / "outputs", frozenset(names))


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


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["qwen2", "gemma2"])  # the second caps its logits and scales its embedding
def test_rows_have_the_fisher_information_of_their_uses(
    model_type: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_factors, "PART_TOKENS", 32)
    monkeypatch.setattr(row_groups, "ROWS_OF_GROUP", 8)
    cap = 2.0 if model_type == "gemma2" else None
    more = {} if cap is None else {"final_logit_softcapping": cap}
    task = measured(tmp_path, model_type, rows=True, tie_word_embeddings=tied, **more)
    names = [name for name in task.run({}) if summed_tensor(name)]
    model = BlockModel(ModelFolder(task.model), torch.device("cpu"))
    model.load_all()
    assert model.head.settings.softcap == cap
    assert names == sorted([sums_name(model.head_name, "head"), sums_name(model.embedding_name, "lookup")])
    head, lookup = (load_sums(factor_file(task.directory, name)) for name in sorted(names, key=lambda n: "lookup" in n))
    assert len(head.sums) > 1 and torch.equal(head.labels, lookup.labels) == tied
    ids = torch.from_numpy(TokenWindows.load(task.windows).windows["calibration"])
    uses = list(model_scores(model, ids, label_draws(0, *ids.shape), 2))
    top = next(use for use in uses if use.name == model.head_name and isinstance(use, LinearUse))
    products = (top.inputs @ model.head.weight.T).requires_grad_(True)
    logits = products if cap is None else cap * torch.tanh(products / cap)
    information = torch.zeros_like(products)
    for label in range(WORDS):  # the expectation over all labels
        one = logits.log_softmax(-1)[:, label]
        (gradient,) = torch.autograd.grad(one.sum(), products, retain_graph=True)
        information += one.detach().exp()[:, None] * gradient.square()
    information[~top.scores.any(-1)] = 0  # what no label is drawn for
    expected = RowAccumulator(head.labels, top.inputs.shape[1])
    expected.add_outputs(top.inputs, information)
    assert torch.allclose(head.sums, expected.result().sums, rtol=1e-3, atol=1e-6 * float(head.sums.abs().max()))
    below = next(use for use in uses if isinstance(use, LookupUse) and use.name == model.embedding_name)
    rows = RowAccumulator(lookup.labels, below.scores.shape[1])
    rows.add_rows(below.ids, below.scores)
    scale = float(lookup.sums.abs().max())
    assert torch.allclose(lookup.sums, rows.result().sums, rtol=1e-3, atol=1e-5 * scale)
    assert lookup.seen.sum() == ids.numel()


@pytest.mark.parametrize("fails_at", [("_forward", 0), ("_block", 1), ("_block", 0), ("_lookups", 0)])
def test_an_interrupted_pass_goes_on_to_the_same_bytes(
    fails_at: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole, cut = (measured(tmp_path / name, rows=True) for name in ("whole", "cut"))
    found = whole.run({})
    where, block = fails_at
    run_block, read = BlockModel.run_block, Pass._block
    with monkeypatch.context() as patched:

        def stop(self: Any, at: int, *arguments: Any) -> Any:
            if at == block:
                raise KeyboardInterrupt
            return (run_block if where == "_forward" else read)(self, at, *arguments)

        def stop_late(self: Any, scores: Any) -> Any:
            raise KeyboardInterrupt

        if where == "_lookups":
            patched.setattr(Pass, "_lookups", stop_late)
        else:
            patched.setattr(*((BlockModel, "run_block") if where == "_forward" else (Pass, "_block")), stop)
        with pytest.raises(KeyboardInterrupt):
            cut.run({})
    assert list(cut.directory.glob("*-*.safetensors")), "states to go on from"
    assert cut.run({}) == found
    for name in found:
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
