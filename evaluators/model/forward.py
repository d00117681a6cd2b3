"""This module runs windows of text through a model that is in memory, a batch of windows at a time.

Shapes: B windows, T positions, D hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from evaluators.model.block_model import BlockModel

BATCH_TOKENS = 2048  # positions in a batch, where memory allows: no faster with more on a CPU, and enough for a GPU


def chunked(run: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Apply ``run`` to ``rows`` (B, T, ...) in batches of at most BATCH_TOKENS positions, and concatenate the results.

    A batch is at least one whole window.
    """
    return torch.cat([run(chunk) for chunk in rows.split(max(1, BATCH_TOKENS // rows.shape[1]))])


@torch.inference_mode()
def final_hidden(model: BlockModel, ids: Tensor) -> Tensor:
    """Return the final hidden states (B, T, D), after the final norm, of a loaded model for token ids (B, T)."""
    return chunked(lambda rows: model.run_from(0, model.embed(rows)), ids)
