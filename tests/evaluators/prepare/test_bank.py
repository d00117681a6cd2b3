"""The bank holds the bytes that ship; damage is found and mended."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bitgenome.common.errors import UserError
from evaluators.prepare.bank import (
    Bank,
    BankError,
    bank_digest,
    damaged_tensors,
    group_tensors,
    readable,
    tensor_file,
    write_manifest,
)
from evaluators.prepare.input_group import InputGroup, group_file
from evaluators.prepare.output_factor import factor_file
from evaluators.prepare.row_hessians import ROLES, load_all_sums, save_sums, summed_tensor, sums_name, sums_readable
from quantizers.formats.packed_tensor import dequantize
from quantizers.formats.table import FORMATS
from quantizers.rounding.sparsegpt import compensate
from quantizers.settings import CompensationSettings, Sparsity
from quantizers.statistics.row_groups import RowAccumulator
from tests.conftest import SmallBank
from workers.pool.base import SerialPool
from workers.storage.staging import paths_of

NAME = "model.layers.1.self_attn.v_proj.weight"


def test_recorded_errors_are_those_of_the_decoded_bytes(small_bank: SmallBank) -> None:
    group = InputGroup.load(group_file(small_bank.directory, NAME.replace("v_proj.weight", "q_proj")))
    W, H = small_bank.folder.read(NAME).double(), group.hessian.double()
    bank = Bank(small_bank.directory)
    for fmt in ("Q2_K", "Q4_K", "Q8_0"):
        dW = W - bank.weights(NAME, FORMATS[fmt], 256, torch.device("cpu")).double()
        entry = bank.entry(NAME, FORMATS[fmt])
        assert entry.error == pytest.approx(float((dW @ H * dW).sum()), rel=1e-3)
        assert entry.power == pytest.approx(float((W @ H * W).sum()), rel=1e-3)


def test_more_bits_lose_less_in_every_tensor(small_bank: SmallBank) -> None:
    bank = Bank(small_bank.directory)
    for gene in small_bank.space.genes:
        errors = [bank.entry(gene.name, fmt).relative for fmt in gene.formats]
        assert errors == sorted(errors, reverse=True)
        assert 0 < errors[-1] < errors[0] < 0.2


def test_building_a_tensor_again_gives_the_same_bytes(small_bank: SmallBank, tmp_path: Path) -> None:
    task = small_bank.bank_tasks(tmp_path)[0]
    (names,) = SerialPool().map([task])
    for name in names:
        assert tensor_file(tmp_path, name).read_bytes() == tensor_file(small_bank.directory, name).read_bytes()


def test_a_truncated_or_altered_file_is_found(small_bank: SmallBank, tmp_path: Path) -> None:
    names = [NAME, "model.layers.0.mlp.down_proj.weight"]
    for name in names:
        shutil.copy(tensor_file(small_bank.directory, name), tmp_path)
    write_manifest(tmp_path, names)
    assert damaged_tensors(tmp_path) == []
    path = tensor_file(tmp_path, NAME)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert damaged_tensors(tmp_path) == [NAME]
    path.write_bytes(data[: len(data) // 2])
    assert damaged_tensors(tmp_path) == [NAME]
    assert not readable(tmp_path, NAME, ["Q2_K"])
    with pytest.raises(BankError, match=rf"expected the bank file of {NAME}"):
        Bank(tmp_path).packed(NAME, FORMATS["Q2_K"])


def test_a_format_that_is_not_there_is_named(small_bank: SmallBank) -> None:
    with pytest.raises(BankError, match=r"expected Q6_K of .* in the bank, found Q2_K, Q3_K, Q4_K, Q8_0"):
        Bank(small_bank.directory).packed(NAME, FORMATS["Q6_K"])


def test_the_digest_depends_on_everything_that_decides_the_bytes() -> None:
    formats = {NAME: [FORMATS["Q2_K"]]}
    digests = {
        bank_digest("m", "c", formats, CompensationSettings(), {}),
        bank_digest("n", "c", formats, CompensationSettings(), {}),
        bank_digest("m", "d", formats, CompensationSettings(), {}),
        bank_digest("m", "c", {NAME: [FORMATS["Q3_K"]]}, CompensationSettings(), {}),
        bank_digest("m", "c", formats, CompensationSettings(damping=0.02), {}),
        bank_digest("m", "c", formats, CompensationSettings(refinement_rounds=0), {}),
        bank_digest("m", "c", formats, CompensationSettings(), {NAME: Sparsity.of_fraction(0.5)}),
        bank_digest("m", "c", formats, CompensationSettings(), {NAME: Sparsity.of_pattern("2:4")}),
    }
    assert len(digests) == 8


def test_a_pruned_tensor_leaves_the_others_of_its_group_as_they_are(small_bank: SmallBank, tmp_path: Path) -> None:
    task = next(t for t in small_bank.bank_tasks(tmp_path) if NAME in group_tensors(t.group))
    list(SerialPool().map([replace(task, sparsity={NAME: Sparsity.of_pattern("2:4")})]))
    for name in group_tensors(task.group):
        same = tensor_file(tmp_path, name).read_bytes() == tensor_file(small_bank.directory, name).read_bytes()
        assert same is (name != NAME)
    zeros = Bank(tmp_path).weights(NAME, FORMATS["Q2_K"], 256, torch.device("cpu")) == 0
    assert (zeros.unflatten(1, (-1, 4)).sum(2) >= 2).all()


def test_a_group_that_is_pruned_whole_keeps_its_zeros(small_bank: SmallBank, tmp_path: Path) -> None:
    task = next(t for t in small_bank.bank_tasks(tmp_path) if NAME in group_tensors(t.group))
    names = group_tensors(task.group)
    list(SerialPool().map([replace(task, sparsity=dict.fromkeys(names, Sparsity.of_fraction(0.5)))]))
    for name in names:
        W = Bank(tmp_path).weights(name, FORMATS["Q8_0"], 256, torch.device("cpu"))
        assert 0.5 <= float((W == 0).float().mean()) < 0.51


def test_files_hold_nothing_but_packed_bytes_and_json(small_bank: SmallBank) -> None:
    with safe_open(tensor_file(small_bank.directory, NAME), framework="pt") as file:
        assert {str(file.get_tensor(key).dtype) for key in file.keys()} == {"torch.uint8"}  # noqa: SIM118
        assert set(json.loads(file.metadata()["errors"])) == {"Q2_K", "Q3_K", "Q4_K", "Q8_0"}
        data = file.get_tensor("Q2_K")
    assert dequantize(FORMATS["Q2_K"], data).shape == (128, 256)


def test_rows_are_rounded_under_the_hessians_of_their_groups(small_bank: SmallBank, tmp_path: Path) -> None:
    """Each group's bytes are those of its rows alone under its own Hessian, whichever groups the others are in."""
    W = small_bank.folder.read(NAME).float()
    labels = (torch.arange(len(W)) * 7) % 3
    draws = torch.Generator().manual_seed(0)
    found = RowAccumulator(labels, W.shape[1])
    found.add_outputs(torch.randn(900, W.shape[1], generator=draws), torch.rand(900, len(W), generator=draws))
    more = RowAccumulator(labels, W.shape[1])
    more.add_rows(torch.randint(len(W), (300,), generator=draws), torch.randn(300, W.shape[1], generator=draws))
    files = tuple(factor_file(tmp_path, sums_name(NAME, role)) for role in ROLES)
    for file, part in zip(files, (found, more), strict=True):
        save_sums(file, part.result())
    (task,) = [t for t in small_bank.bank_tasks(tmp_path) if NAME in group_tensors(t.group)]
    names = {NAME: ("Q2_K", "Q4_K")}
    SerialPool().map([replace(task, formats=names, sums=files)]).__next__()
    sums, bank, H = load_all_sums(files), Bank(tmp_path), InputGroup.load(task.group).hessian
    for fmt in ("Q2_K", "Q4_K"):
        for label, own in enumerate(sums.hessians()):
            rows = labels == label
            alone = compensate({"w": W[rows]}, {"w": [FORMATS[fmt]]}, own, task.settings)["w"][fmt]
            assert torch.equal(bank.packed(NAME, FORMATS[fmt])[rows], alone.packed.data)
        entry = bank.entry(NAME, FORMATS[fmt])
        dW = W - bank.weights(NAME, FORMATS[fmt], W.shape[1], W.device)
        assert entry.error == pytest.approx(float((dW @ H * dW).sum()), rel=1e-3), "of the input, as every tensor's"
        assert entry.power == pytest.approx(float((W @ H * W).sum()), rel=1e-3)


def test_a_task_says_all_files_that_it_reads(small_bank: SmallBank, tmp_path: Path) -> None:
    """Those that other machines fetch."""
    task = replace(small_bank.bank_tasks(tmp_path)[0], outputs=(tmp_path / "factor",), sums=(tmp_path / "rows",))
    assert {tmp_path / "factor", tmp_path / "rows", task.group, task.model} <= set(paths_of(task))


def test_cut_sums_are_named(tmp_path: Path) -> None:
    file = tmp_path / sums_name("lm_head.weight", "head")
    save_sums(file, RowAccumulator(torch.tensor([0, 1]), 4).result())
    assert sums_readable(file) and summed_tensor(file.name) == "lm_head.weight"
    file.write_bytes(file.read_bytes()[:40])
    assert not sums_readable(file)
    with pytest.raises(UserError, match="expected Hessians of rows in .*, found .*: the next attempt measures them"):
        load_all_sums([file])
