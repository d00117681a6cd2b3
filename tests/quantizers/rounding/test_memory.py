"""What rounding takes beside weights and Hessian does not grow with the number of rows, and changes no byte."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quantizers.formats import codebook_packing
from quantizers.formats.codebooks import CODEBOOK_GRIDS
from quantizers.formats.grids import Scales
from quantizers.formats.table import FORMATS
from quantizers.rounding import nearest, pruned_sparsegpt, row_batches
from quantizers.rounding.sparsegpt import compensate
from quantizers.settings import CompensationSettings, Sparsity
from quantizers.statistics import hessian
from tests.quantizers.weights import correlated_hessian, heavy_tailed

ROWS, COLUMNS, TOGETHER = 1024, 256, 256  # rows of the tensor, and those that go at once


class LargestAllocation(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operation allocates."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(found):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                self.size = max(self.size, t.untyped_storage().nbytes())
        return found


def rounded(W: Tensor, H: Tensor) -> dict[str, Any]:
    formats = {"w": [FORMATS[name] for name in ("Q8_0", "Q4_0", "F16")]}
    found = compensate({"w": W}, formats, H, CompensationSettings(refinement_rounds=0))
    return {name: (level.packed.data.tolist(), level.error) for name, level in found["w"].items()}


def pruned(W: Tensor, H: Tensor) -> dict[str, Any]:
    formats, sparsity = {"w": [FORMATS[name] for name in ("Q8_0", "Q4_0")]}, {"w": Sparsity.of_pattern("2:4")}
    settings = CompensationSettings(refinement_rounds=0)
    found = pruned_sparsegpt.prune_and_compensate({"w": W}, formats, sparsity, H, settings)
    return {name: (level.packed.data.tolist(), level.error) for name, level in found["w"].items()}


def codewords(W: Tensor, H: Tensor) -> dict[str, Any]:
    grid = CODEBOOK_GRIDS["IQ3_S"]
    words = grid.codewords(torch.empty(0)).to(torch.int8)
    chosen = torch.randint(len(words), (COLUMNS // grid.vector, ROWS), generator=torch.Generator().manual_seed(0))
    d, codes = torch.ones(1, 1, 1, ROWS), torch.ones(1, grid.sub_blocks, 1, ROWS)
    integers = words[chosen].transpose(1, 2).reshape(COLUMNS, ROWS)
    return {"IQ3_S": codebook_packing.pack_codebook(grid, Scales(d, 0 * d, codes, 0 * codes), integers).tolist()}


@pytest.mark.parametrize("work", [rounded, pruned, codewords])
def test_rows_go_in_chunks_that_change_no_byte(
    work: Callable[[Tensor, Tensor], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    W, H = heavy_tailed(ROWS, COLUMNS), correlated_hessian(COLUMNS)
    whole = work(W, H)
    for module, name, value in (
        (nearest, "ROUNDED_WEIGHTS", TOGETHER * COLUMNS),
        (row_batches, "BATCH_ROWS", TOGETHER),
        (codebook_packing, "PACKED_WEIGHTS", TOGETHER * COLUMNS),
        (pruned_sparsegpt, "PRUNED_WEIGHTS", TOGETHER * COLUMNS),
    ):
        monkeypatch.setattr(module, name, value)
    with LargestAllocation() as largest:
        found = work(W, H)
    assert found == whole
    assert largest.size < W.nbytes


def test_a_hessian_is_factored_in_one_matrix_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    H = correlated_hessian(512).float()
    expected = torch.linalg.inv(torch.linalg.cholesky(hessian.damped(H, 0.01).flip(0, 1)).flip(0, 1))
    monkeypatch.setattr(hessian, "BLOCK_ENTRIES", 1 << 12)
    monkeypatch.setattr(hessian, "INVERSE_BLOCK", 32)

    class Matrices(LargestAllocation):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.size = 0
            found = super().__torch_dispatch__(func, types, args, kwargs)
            self.count += self.size >= H.numel() * 8
            return found

    with Matrices() as matrices:
        U, _ = hessian.inverse_factor(H, 0.01)
    assert matrices.count == 1
    assert torch.allclose(U, expected, rtol=1e-8, atol=1e-10)
