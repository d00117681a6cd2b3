"""This module says whether Triton's kernels are used instead of torch's, which are the reference."""

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from quantizers.formats.grids import GRIDS

log = logging.getLogger(__name__)

PANEL = 32  # columns that are rounded one after another, before their errors reach the others
ENABLED = {"panels", "searches"}  # the kernels that may be used


def panel_kernels(like: Tensor) -> ModuleType | None:
    """Return ``quantizers.rounding.panel_kernels`` where it runs on tensors like ``like``; None: use torch."""
    return _panels(like.device) if _wanted("panels", like) else None


def search_kernels(like: Tensor) -> ModuleType | None:
    """Return ``quantizers.rounding.search_kernels`` where it runs on tensors like ``like``; None: use torch."""
    return _searches(like.device) if _wanted("searches", like) else None


def _wanted(kind: str, like: Tensor) -> bool:
    return kind in ENABLED and like.dtype == torch.float32 and like.device.type != "cpu"


@cache
def _panels(device: torch.device) -> ModuleType | None:
    """Return the kernels if they can be compiled, which takes Triton and a C compiler, and give what they should."""
    grid = GRIDS["Q4_0"]
    ones, H = torch.ones(PANEL, PANEL, device=device), torch.eye(PANEL, device=device)
    integers, errors, q = torch.zeros_like(ones, dtype=torch.int8), torch.zeros_like(ones), ones.clone()
    try:
        from quantizers.rounding import panel_kernels as kernels  # noqa: PLC0415 - Triton is not everywhere

        kernels.round_panel(ones, H, (ones, ones, 0 * ones), PANEL, grid, integers, errors)
        kernels.descend_panel(ones, H, q, (ones, ones), PANEL, grid, errors)
        works = bool((integers == 1).all() and (q == 2).all() and (errors == 1).all())
    except ImportError:
        return None
    except Exception as error:  # whatever a compiler raises
        log.warning("columns are rounded by torch's kernels, as Triton's do not run here: %s", error)
        return None
    return kernels if works else None


@cache
def _searches(device: torch.device) -> ModuleType | None:
    """As ``_panels``."""
    grid = GRIDS["Q4_0"]
    x, w = torch.full((1, 1, 32, 32), 3.0, device=device), torch.ones(1, 1, 32, 1, device=device)
    try:
        from quantizers.rounding import search_kernels as kernels  # noqa: PLC0415 - Triton is not everywhere

        step = kernels.search_symmetric(x, w, 2, (6.0,), (grid.low, grid.high), None, positive=False)
        other, offset = kernels.search_affine(x.cumsum(2) - x, w, (31.0,), 31, nonnegative=True)
        error = kernels.sums(grid, x, w, step, 0 * step)[0]
        works = bool(step.sub(0.5).abs().amax() + other.sub(3).abs().amax() + offset.amax() + error.amax() < 1e-4)
    except ImportError:
        return None
    except Exception as error:
        log.warning("scales are searched by torch's kernels, as Triton's do not run here: %s", error)
        return None
    return kernels if works else None
