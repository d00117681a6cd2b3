"""A configured importance matrix weights the columns of the blocks' tensors, and one of another model is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bitgenome.common.errors import UserError
from bitgenome.config.run import RunConfig, absolute_paths, parse_config
from bitgenome.plan.imatrix import imatrix_digest, imatrix_importance
from bitgenome.plan.plan import Plan, make_plan
from bitgenome.run.bank import BankBuild
from evaluators.prepare.bank import Bank
from evaluators.prepare.input_group import InputGroup, group_file
from exporters.files.imatrix import write_imatrix
from exporters.metadata.tensor_names import tensor_table
from quantizers.formats.table import format_for
from quantizers.rounding.nearest import quantize
from tests.bitgenome.conftest import LITTLE
from tests.conftest import SmallBank

GROUP = "model.layers.0.self_attn.q_proj"


def configured(folder: Path, imatrix: Path | None, **quantization: object) -> RunConfig:
    settings = LITTLE | {"name": "mine", "storage_path": str(folder / "runs"), "budget": {"bits_per_weight": 3.5}}
    how = {"compensation": False, "imatrix": str(imatrix) if imatrix else None} | quantization
    return absolute_paths(parse_config(settings | {"quantization": how, "workers": {"ray": "off"}}, "here"))


@pytest.fixture
def squares(tmp_path: Path) -> dict[str, np.ndarray]:
    """Mean squares for all tensors of the blocks, the same for those that read one input, written to a file."""
    plan = make_plan(configured(tmp_path, None))
    random = np.random.default_rng(0)
    columns = {width: random.lognormal(size=width).astype(np.float32) for width in (256, 768)}
    tensors = [entry for entry in tensor_table(plan.folder) if entry.gguf_name.startswith("blk.") and entry.quantizable]
    found = {entry.gguf_name: columns[entry.shape[1]] for entry in tensors}
    write_imatrix(tmp_path / "imatrix.gguf", found, tokens=4096, window=512, dataset="wiki")
    return found


def built(plan: Plan, small_bank: SmallBank) -> torch.Tensor:
    """The bytes of a tensor of a bank from the Hessians of ``small_bank``."""
    build = BankBuild(plan, "calibration")
    for task in build.tasks([group_file(small_bank.directory, GROUP)]):
        task.run({})
    return Bank(build.directory).packed(f"{GROUP}.weight", format_for("W2", 256))


def test_mean_squares_of_the_file_weight_the_columns(
    squares: dict[str, np.ndarray], small_bank: SmallBank, tmp_path: Path
) -> None:
    plan = make_plan(configured(tmp_path, tmp_path / "imatrix.gguf"))
    given = imatrix_importance(plan.config.quantization, plan.file, [gene.name for gene in plan.space.genes])
    name = f"{GROUP}.weight"
    assert len(given) == len(squares) and np.allclose(given[name], squares["blk.0.attn_q.weight"], rtol=1e-6)
    weights = plan.folder.read(name).float()
    expected = quantize(format_for("W2", 256), weights, torch.from_numpy(given[name]))
    assert torch.equal(built(plan, small_bank), expected), "without compensation it decides alone"
    own = make_plan(configured(tmp_path, None))
    assert not torch.equal(built(own, small_bank), expected)
    group = InputGroup.load(group_file(small_bank.directory, GROUP))
    assert torch.equal(built(own, small_bank), quantize(format_for("W2", 256), weights, group.hessian.diagonal()))
    with_loop = [make_plan(configured(tmp_path, path, compensation=True)) for path in (None, tmp_path / "imatrix.gguf")]
    assert not torch.equal(*(built(plan, small_bank) for plan in with_loop))


def test_another_file_makes_another_bank_and_a_path_decides_nothing(
    squares: dict[str, np.ndarray], tmp_path: Path
) -> None:
    first = make_plan(configured(tmp_path, tmp_path / "imatrix.gguf"))
    (tmp_path / "copy.gguf").write_bytes((tmp_path / "imatrix.gguf").read_bytes())
    copy = make_plan(configured(tmp_path, tmp_path / "copy.gguf"))
    assert (
        BankBuild(first, "c").directory == BankBuild(copy, "c").directory and first.config.digest == copy.config.digest
    )
    assert imatrix_digest(first.config.quantization) and imatrix_digest(configured(tmp_path, None).quantization) is None
    write_imatrix(tmp_path / "copy.gguf", {k: v + 1 for k, v in squares.items()}, tokens=4096, window=512, dataset="w")
    assert BankBuild(first, "c").directory != BankBuild(make_plan(copy.config), "c").directory


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "expected a file for quantization.imatrix, found nothing at"),
        ("lacks", r"expected the importance of blk.5.ffn_down.weight in .*, found none: it has 41"),
        (
            "wider",
            r"expected the importance of 256 columns of blk.0.attn_q.weight in .*, found 1 x 2048: is it that of",
        ),
        ("scaling", "expected an imatrix or scaling, found both"),
    ],
)
def test_what_is_not_of_the_model_is_refused_before_any_work(
    change: str, message: str, squares: dict[str, np.ndarray], tmp_path: Path
) -> None:
    file, more = tmp_path / "other.gguf", {"scaling": {"kind": "awq"}} if change == "scaling" else {}
    if change == "lacks":
        squares.pop("blk.5.ffn_down.weight")
    if change == "wider":
        squares["blk.0.attn_q.weight"] = np.ones(2048, np.float32)
    if change != "missing":
        write_imatrix(file, squares, tokens=4096, window=512, dataset="wiki")
    with pytest.raises(UserError, match=message):
        make_plan(configured(tmp_path, file, **more))
    assert not (tmp_path / "runs").exists()
