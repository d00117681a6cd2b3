"""Coordinate descent never raises the error it descends on, and ends where no single integer helps."""

import pytest
import torch
from torch import Tensor

from quantizers.formats.grids import GRIDS, Grid, Scales
from quantizers.rounding.codes import Codes
from quantizers.rounding.coordinate_descent import Start, descend
from quantizers.rounding.nearest import fit_rows, nearest_integers
from quantizers.rounding.row_choice import row_errors
from tests.quantizers.weights import correlated_hessian, heavy_tailed

all_grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda g: g.format.name)
COLUMNS, ROWS = 512, 32


def decoded(grid: Grid, codes: Codes) -> Tensor:
    scales, integers = codes.scales, codes.integers
    return (grid.blocks(integers.to(scales.d.dtype)) * scales.step - scales.offset).view_as(integers)


def start(grid: Grid) -> tuple[Tensor, Tensor, Scales, Tensor]:
    W, H = heavy_tailed(ROWS, COLUMNS).T.contiguous(), correlated_hessian(COLUMNS)
    scales = fit_rows(grid, W, torch.ones(COLUMNS))
    return W, H, scales, nearest_integers(grid, scales, W)


@all_grids
def test_every_round_lowers_the_error_of_plain_rounding(grid: Grid) -> None:
    W, H, scales, integers = start(grid)
    errors = []
    for rounds in range(4):
        found = descend(Start(grid, W, Codes(scales, integers)), H, rounds=rounds)
        errors.append(float(row_errors((W - decoded(grid, found)).T, H).sum()))
    assert errors[1] < 0.8 * errors[0]
    assert errors == sorted(errors, reverse=True)


@all_grids
def test_scales_and_integers_stay_legal(grid: Grid) -> None:
    W, H, scales, integers = start(grid)
    found = descend(Start(grid, W, Codes(scales, integers)), H, rounds=2)
    scales, integers = found.scales, found.integers
    assert grid.low <= integers.min() and integers.max() <= grid.high
    for codes, (low, high) in ((scales.scale, grid.scale_codes), (scales.min, grid.min_codes)):
        assert low <= codes.min() and codes.max() <= high
        assert torch.equal(codes, codes.round())
    for unit in (scales.d, scales.dmin):
        assert torch.equal(unit, unit.half().float())


@all_grids
def test_given_tensors_are_left_alone(grid: Grid) -> None:
    W, H, scales, integers = start(grid)
    before = W.clone(), H.clone(), scales.d.clone(), scales.scale.clone(), integers.clone()
    descend(Start(grid, W, Codes(scales, integers)), H, rounds=1)
    assert all(torch.equal(a, b) for a, b in zip(before, (W, H, scales.d, scales.scale, integers), strict=True))


def test_a_single_integer_cannot_be_improved_at_the_end() -> None:
    """In float64, after many rounds, moving any integer of a row by one step raises the error."""
    grid = GRIDS["Q8_0"]
    W, H = heavy_tailed(ROWS, 32).T.double().contiguous(), correlated_hessian(32).double()
    scales = fit_rows(grid, W, torch.ones(32, dtype=torch.float64))
    found = descend(Start(grid, W, Codes(scales, nearest_integers(grid, scales, W))), H, rounds=200)
    G = H @ (W - decoded(grid, found))
    step = found.scales.step.view(1, -1).abs()
    inside = found.integers.abs() < grid.high
    gain = 2 * G.abs() * step - H.diagonal()[:, None] * step.square()
    assert (gain[inside] <= 1e-12).all()
