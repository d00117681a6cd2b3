"""Two-sided rounding: the elimination between rows in float64, and what it gains for every format."""

import pytest
import torch
from torch import Tensor

from quantizers.formats.table import FORMATS
from quantizers.rounding import sparsegpt
from quantizers.rounding.row_order import RowOrder, factor_entries, output_blocks
from quantizers.rounding.sparsegpt import compensate
from quantizers.settings import CompensationSettings
from tests.quantizers.weights import correlated_hessian, heavy_tailed

ROWS = 48
QUICK = ("Q2_K", "Q4_K", "Q4_0", "Q5_1", "Q8_0", "IQ4_XS")
SLOW = ("Q3_K", "Q5_K", "Q6_K", "Q4_1", "Q5_0", "IQ4_NL", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
FORMAT_NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.long) for name in SLOW)]


def output_factor(rows: int, seed: int = 5) -> Tensor:
    """S (rows, rows) of gradients that go together."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, rows, generator=generator) @ torch.randn(rows, rows, generator=generator) / rows**0.5
    return mixed @ mixed.T / rows + 0.1 * torch.eye(rows)


def two_sided_error(S: Tensor, dW: Tensor, H: Tensor) -> float:
    return float(((S.double() @ dW.double()) * (dW.double() @ H.double())).sum())


@pytest.mark.parametrize(("rows", "blocks"), [(8, 1), (24, 1), (29, 1), (24, 2)])
def test_later_rows_aim_at_what_makes_up_for_earlier_ones(rows: int, blocks: int) -> None:
    """The target of row k is W_k plus its part of the least-squares answer of all later rows to the errors before."""
    r = rows // blocks
    factors = torch.stack([output_factor(r, seed) for seed in range(blocks)])
    W = torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))
    order, targets, rounded = RowOrder(rows, factors), W.clone(), torch.empty_like(W)
    S = torch.block_diag(*factors.double())
    seen: list[int] = []
    for step in range(order.steps):
        index = order.taken(torch.arange(rows)[:, None], step)[:, 0]
        found = order.taken(targets, step).clone()
        if seen:
            later = [row for row in range(rows) if row not in seen]
            E = (W - rounded)[seen].double()
            answer = torch.linalg.solve(S[later][:, later], S[later][:, seen] @ E)
            expected = W[index].double() + answer[[later.index(row) for row in index.tolist()]]
            assert torch.allclose(found.double(), expected, atol=1e-4)
        values = found.round(decimals=0)
        order.put(rounded, step, values)
        order.spread(targets, step, found - values)
        seen += index.tolist()
    assert sorted(seen) == list(range(rows))


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_both_sides_leave_less_of_the_loss_than_one(name: str) -> None:
    fmt, columns = FORMATS[name], 256
    W, H, S = heavy_tailed(ROWS, columns), correlated_hessian(columns).float(), output_factor(ROWS)
    one = compensate({"w": W}, {"w": [fmt]}, H)["w"][name]
    two = compensate({"w": W}, {"w": [fmt]}, H, outputs={"w": S[None]})["w"][name]
    errors = [two_sided_error(S, W - level.packed.dequantize(), H) for level in (one, two)]
    assert errors[1] < 0.8 * errors[0]
    assert two.error > one.error, "the layer's own output error pays for it"
    assert two.error == pytest.approx(two_sided_error(torch.eye(ROWS), W - two.packed.dequantize(), H), rel=1e-4)


def test_a_factor_without_correlations_changes_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsegpt, "ROW_SWEEPS", 0)  # which would refine each row once more
    W, H = heavy_tailed(ROWS, 256), correlated_hessian(256).float()
    formats = {"w": [FORMATS[name] for name in ("Q4_K", "Q8_0", "F16")]}
    plain = compensate({"w": W}, formats, H)["w"]
    found = compensate({"w": W}, formats, H, outputs={"w": torch.eye(ROWS)[None]})["w"]
    for name, level in plain.items():
        assert torch.equal(found[name].packed.data, level.packed.data)
        assert found[name].error == pytest.approx(level.error, rel=1e-5)


def test_tensors_of_a_group_and_blocks_of_a_factor_do_not_touch_each_other() -> None:
    H, fmt = correlated_hessian(256).float(), [FORMATS["Q3_K"]]
    W = {"a": heavy_tailed(ROWS, 256), "b": heavy_tailed(32, 256, 1), "c": heavy_tailed(16, 256, 2)}
    factors = {"a": output_factor(ROWS)[None], "b": torch.stack([output_factor(16, 1), output_factor(16, 2)])}
    together = compensate(W, dict.fromkeys(W, fmt), H, outputs=factors)
    for name, weights in W.items():
        sides = {name: factors[name]} if name in factors else None
        alone = compensate({name: weights}, {name: fmt}, H, outputs=sides)[name]["Q3_K"]
        assert torch.equal(together[name]["Q3_K"].packed.data, alone.packed.data)
    for index, half in enumerate((slice(0, 16), slice(16, 32))):
        alone = compensate({"b": W["b"][half]}, {"b": fmt}, H, outputs={"b": factors["b"][index][None]})["b"]["Q3_K"]
        assert torch.equal(together["b"]["Q3_K"].packed.data[half], alone.packed.data)


def test_a_further_sweep_leaves_less_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    W, H, S = heavy_tailed(ROWS, 256), correlated_hessian(256).float(), output_factor(ROWS)
    errors = {}
    for sweeps in (0, 1):
        monkeypatch.setattr(sparsegpt, "ROW_SWEEPS", sweeps)
        formats = {"w": [FORMATS[name] for name in ("Q2_K", "Q4_0", "IQ2_XXS")]}
        for name, level in compensate({"w": W}, formats, H, outputs={"w": S[None]})["w"].items():
            errors[name, sweeps] = two_sided_error(S, W - level.packed.dequantize(), H)
    assert all(errors[name, 1] < errors[name, 0] for name, sweeps in errors if sweeps)


def test_factors_that_do_not_fit_are_refused() -> None:
    W, H, fmt = heavy_tailed(32, 256), correlated_hessian(256).float(), [FORMATS["Q4_0"]]
    with pytest.raises(ValueError, match=r"output factor \(blocks, r, r\) of 32 rows, found \(1, 16, 16\)"):
        compensate({"w": W}, {"w": fmt}, H, outputs={"w": torch.eye(16)[None]})
    with pytest.raises(ValueError, match="output factor holds non-finite"):
        compensate({"w": W}, {"w": fmt}, H, outputs={"w": torch.full((1, 32, 32), torch.inf)})


def test_without_compensation_no_side_is_spread() -> None:
    W, H, fmt = heavy_tailed(32, 256), correlated_hessian(256).float(), [FORMATS["Q4_0"]]
    settings = CompensationSettings(compensation=False)
    plain, found = (
        compensate({"w": W}, {"w": fmt}, H, settings, outputs=o) for o in (None, {"w": output_factor(32)[None]})
    )
    assert torch.equal(plain["w"]["Q4_0"].packed.data, found["w"]["Q4_0"].packed.data)


@pytest.mark.parametrize(("rows", "blocks"), [(256, 1), (4096, 1), (14336, 4), (28672, 7), (18944, 8)])
def test_many_rows_are_divided_into_equal_blocks(rows: int, blocks: int) -> None:
    assert output_blocks(rows) == blocks
    assert factor_entries(rows) == blocks * (rows // blocks) ** 2
