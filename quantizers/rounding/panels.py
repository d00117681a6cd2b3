"""This module says whether panels of columns are rounded by Triton's kernels or by torch's, which are the reference."""

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from quantizers.formats.grids import GRIDS

log = logging.getLogger(__name__)

PANEL = 32  # columns that are rounded one after another, before their errors reach the others
ENABLED = False  # until measured


def panel_kernels(like: Tensor) -> ModuleType | None:
    """Return the module of kernels for panels of the type and on the device of ``like``; None: torch's are used."""
    return _compiled(like.device) if ENABLED and like.dtype == torch.float32 and like.device.type != "cpu" else None


@cache
def _compiled(device: torch.device) -> ModuleType | None:
    """Return the kernels if they can be compiled, which takes Triton and a C compiler, and give what they should."""
    try:
        from quantizers.rounding import panel_kernels as kernels  # noqa: PLC0415 - Triton is not everywhere
    except ImportError:
        return None
    grid = GRIDS["Q4_0"]
    ones, H = torch.ones(PANEL, PANEL, device=device), torch.eye(PANEL, device=device)
    integers, errors, q = torch.zeros_like(ones, dtype=torch.int8), torch.zeros_like(ones), ones.clone()
    try:
        kernels.round_panel(ones, H, (ones, ones, 0 * ones), PANEL, grid, integers, errors)
        kernels.descend_panel(ones, H, q, (ones, ones), PANEL, grid, errors)
        works = bool((integers == 1).all() and (q == 2).all() and (errors == 1).all())
    except Exception as error:  # whatever a compiler raises
        log.warning("columns are rounded by torch's kernels, as Triton's do not run here: %s", error)
        return None
    return kernels if works else None
