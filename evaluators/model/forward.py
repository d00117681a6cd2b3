"""Whole windows of text through a model that is in memory, some at a time.

Shapes: B windows, T positions, D hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from evaluators.model.block_model import BlockModel

BATCH_TOKENS = 2048  # positions at once, where memory allows: more do not run faster on a CPU, and fill an accelerator


def chunked(run: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """``run`` over the rows of a (B, T, ...) tensor, BATCH_TOKENS positions at a time."""
    return torch.cat([run(chunk) for chunk in rows.split(max(1, BATCH_TOKENS // rows.shape[1]))])


@torch.inference_mode()
def final_hidden(model: BlockModel, ids: Tensor) -> Tensor:
    """(B, T) token ids -> (B, T, D) final hidden states of a loaded model."""
    return chunked(lambda rows: model.run_from(0, model.embed(rows)), ids)
