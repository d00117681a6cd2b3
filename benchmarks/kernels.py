"""Counts the kernels that a part of a program launches: by the profiler on an accelerator, else by dispatched ones.

An operation that only makes a view, or allocates, launches none. The two counts differ a little: some operations launch
several kernels, and copies of memory are none.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bitgenome.common.devices import best_device

NO_KERNEL = frozenset(
    {
        "view", "_unsafe_view", "t", "transpose", "permute", "slice", "select", "expand", "unsqueeze", "squeeze",
        "detach", "alias", "as_strided", "split", "split_with_sizes", "unbind", "diagonal", "unfold", "lift_fresh",
        "_reshape_alias", "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided",
        "_local_scalar_dense",
    }
)  # fmt: skip


class KernelCount(TorchDispatchMode):
    """Counts the operations that would each launch a kernel on an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ not in NO_KERNEL:
            self.kernels += 1
        return func(*args, **kwargs or {})


def count_kernels(part: Callable[[], Any]) -> dict[str, Any]:
    """Run ``part`` and return its number of kernels, how it was counted and, by the profiler, their seconds."""
    if best_device().type == "cpu":
        with KernelCount() as counted:
            part()
        return {"kernels": counted.kernels, "counted_by": "dispatched"}
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        part()
        torch.accelerator.synchronize()
    events = [e for e in seen.profiler.kineto_results.events() if e.device_type() == DeviceType.CUDA]
    kernels = [e for e in events if not e.name().startswith(("Memcpy", "Memset"))]
    busy = sum(e.duration_ns() for e in kernels) / 1e9
    return {"kernels": len(kernels), "counted_by": "launched", "copies": len(events) - len(kernels), "busy": busy}
