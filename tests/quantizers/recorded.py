"""A recording of a function's operations on the CPU that behaves as a GPU's graph: it knows addresses, not values."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bitgenome.common import replay

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_linalg_check_errors", "equal"}


class Recorder(TorchDispatchMode):
    """Keeps operations with their tensors; those that a GPU could not record raise RuntimeError, as there."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name in WAITING or (name.startswith("index") and any(t.dtype == torch.bool for t in given[1:])):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        found = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(found) if isinstance(t, Tensor)]
        known = {t.untyped_storage().data_ptr() for t in given}
        fresh = any(t.untyped_storage().data_ptr() not in known for t in made)
        if fresh or func._schema.is_mutable:
            self.operations.append(lambda: self._again(func, args, kwargs or {}, made if fresh else []))
        return found

    @staticmethod
    def _again(func: Any, args: Any, kwargs: Any, made: Sequence[Tensor]) -> None:
        found = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
        for mine, new in zip(made, found, strict=False):
            mine.copy_(new)

    def replay(self) -> None:
        for operation in self.operations:
            operation()


def capture(function: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
    """Record ``function`` as ``bitgenome.common.replay.capture`` does; its results are garbage until the replay."""
    with Recorder() as recorder:
        results = function()
    for result in results:
        result.fill_(99)
    return recorder.replay, results


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> replay.Recordings:
    """Recordings that are used on the CPU."""
    found = replay.Recordings()
    monkeypatch.setattr(found, "active", lambda device: found.enabled)
    monkeypatch.setattr(replay, "_RECORDINGS", found)
    monkeypatch.setattr(replay, "capture", capture)
    found.enabled = True
    return found
