"""What a run's model predicts in full precision, computed one block at a time: the original may not fit into memory."""

import numpy as np
import torch
from torch import Tensor

from bitgenome.common.devices import best_device, worker_memory
from bitgenome.plan.plan import Plan
from evaluators.engine.memory import windows_at_once
from evaluators.engine.streamed import streamed
from evaluators.model.sizes import ModelShape
from exporters.runtime.comparison import log_probs
from exporters.runtime.outputs import Outputs
from quantizers.formats.table import QuantFormat


class _NothingPacked:
    """Stands for a bank from which nothing is read: no tensor is quantized."""

    def packed(self, tensor: str, fmt: QuantFormat) -> Tensor:
        raise AssertionError(f"{tensor} is not quantized")


@torch.inference_mode()
def full_precision(plan: Plan, windows: np.ndarray) -> Outputs:
    """Return the log probabilities of the plan's model for token ids ``windows`` (n, T)."""
    folder, device = plan.folder, best_device()
    memory = plan.config.evaluation.memory or worker_memory(device)
    at_once = windows_at_once(ModelShape.of(folder), windows.shape[1], windows.size, memory)
    with streamed(folder, _NothingPacked(), device, at_once) as sweep:
        states = sweep.final_states(torch.from_numpy(windows), "test", [{}])[0]
        head = sweep.head(None)
    return Outputs(folder.path, log_probs(states, head), len(head.weight))
