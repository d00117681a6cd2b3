"""This module says whether Triton's kernels are used instead of torch's, which are the reference."""

import importlib
import logging
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from quantizers.formats.grids import GRIDS

log = logging.getLogger(__name__)

PANEL = 32  # columns that are rounded one after another, before their errors reach the others
ENABLED = {"panels", "searches", "codes", "blocks"}  # the kinds that may be used


Kind = Literal["panels", "searches", "codes", "blocks"]


def kernels_for(kind: Kind, like: Tensor) -> ModuleType | None:
    """Return the module ``quantizers.kernels.<kind>`` where it runs on tensors like ``like``; None: use torch."""
    return _module(kind, like.device) if _wanted(kind, like) else None


def _wanted(kind: Kind, like: Tensor) -> bool:
    return kind in ENABLED and like.dtype == torch.float32 and like.device.type != "cpu"


@cache
def _module(kind: Kind, device: torch.device) -> ModuleType | None:
    """Return the kernels if they can be compiled, which takes Triton and a C compiler, and give what they should."""
    try:
        kernels = importlib.import_module(f"quantizers.kernels.{kind}")  # Triton is not everywhere
        return kernels if TRIALS[kind](kernels, device) else None
    except ImportError:
        return None
    except Exception as error:  # whatever a compiler raises
        log.warning("torch's kernels are used in place of those of %s, which do not run here: %s", kind, error)
        return None


def _panels_work(kernels: ModuleType, device: torch.device) -> bool:
    grid = GRIDS["Q4_0"]
    ones, H = torch.ones(PANEL, PANEL, device=device), torch.eye(PANEL, device=device)
    integers, errors, q = torch.zeros_like(ones, dtype=torch.int8), torch.zeros_like(ones), ones.clone()
    kernels.round_panel(ones, H, (ones, ones, 0 * ones), PANEL, grid, integers, errors)
    kernels.descend_panel(ones, H, q, (ones, ones), PANEL, grid, errors)
    return bool((integers == 1).all() and (q == 2).all() and (errors == 1).all())


def _searches_work(kernels: ModuleType, device: torch.device) -> bool:
    grid = GRIDS["Q4_0"]
    x, w = torch.full((1, 1, 32, 32), 3.0, device=device), torch.ones(1, 1, 32, 1, device=device)
    step = kernels.search_symmetric(x, w, 2, (6.0,), (grid.low, grid.high), None, positive=False)
    other, offset = kernels.search_affine(x.cumsum(2) - x, w, (31.0,), 31, nonnegative=True)
    error = kernels.sums(grid, x, w, step, 0 * step)[0]
    return bool(step.sub(0.5).abs().amax() + other.sub(3).abs().amax() + offset.amax() + error.amax() < 1e-4)


def _codes_work(kernels: ModuleType, device: torch.device) -> bool:
    grid = GRIDS["Q2_K"]
    S, T, N = grid.sub_blocks, grid.width, 32
    H, q, d = torch.eye(S * T, device=device), torch.ones(S * T, N, device=device), torch.ones(N, device=device)
    scale, minimum = torch.ones(2, S, N, device=device)
    kernels.adjust(grid, H, 3 * q, q, (d, d), (scale, minimum))  # the scale takes all that there is to gain
    return bool((scale == 4).all() and (minimum == 1).all())


def _blocks_work(kernels: ModuleType, device: torch.device) -> bool:
    grid = GRIDS["Q4_0"]
    H, ones = torch.eye(64, device=device), torch.ones(64, 32, device=device)
    D, q, d = 3 * ones, ones.clone().view(2, 32, 32), torch.ones(2, 32, device=device)
    kernels.update(grid, H, 3 * ones, D, q, (d, 0 * d), 0.0)  # the step takes all that there is to gain
    return bool((d == 4).all() and (q == 1).all() and (D == 0).all())


TRIALS: dict[Kind, Callable[[ModuleType, torch.device], bool]] = {
    "panels": _panels_work,
    "searches": _searches_work,
    "codes": _codes_work,
    "blocks": _blocks_work,
}
