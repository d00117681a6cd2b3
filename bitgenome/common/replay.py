"""Launches the kernels of a repeated computation together, where the device can record them.

A small kernel takes a GPU some 2 microseconds and Python 13 to launch, so a loop over columns mostly waits for Python.
A recorded graph launches thousands at once. The recorded function is the one that runs everywhere else, so its results
are the same bytes.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

MOST_BYTES = 2 << 30  # of inputs and outputs of all recordings together; the oldest ones are dropped
BRANCHES = True  # whether ``side_by_side`` does what its name says
CALLS_BEFORE = 2  # with the same shapes, before a function is replayed
T = TypeVar("T")
Tensors = Sequence[Tensor]
Function = Callable[..., Tensors]


def replayed(function: Function, fixed: tuple[Any, ...], tensors: Tensors) -> Tensors:
    """Return ``function(*fixed, *tensors)``, tensors that are valid until the next call.

    ``function`` may overwrite its tensors and return them. Where the device records, it is run as it is for the first
    inputs of some shapes, recorded with the second and replayed from then on: then its tensors are copies. So it must
    not wait for the device, must not keep state, and must choose what it does by ``fixed`` and the shapes alone.
    """
    if not records(tensors[0].device):
        return function(*fixed, *tensors)
    return _RECORDINGS.run(function, fixed, tensors)


def side_by_side(parts: Sequence[Callable[[], T]]) -> list[T]:
    """Return what each of ``parts`` returns, in order. Kernels that are recorded do not wait for those of other parts.

    No part may write what another one reads or writes.
    """
    if len(parts) < 2 or not _RECORDINGS.branching:
        return [part() for part in parts]
    main, side = torch.cuda.current_stream(), _RECORDINGS.side_streams(len(parts) - 1)
    for stream in side:
        stream.wait_stream(main)
    found = []
    for stream, part in zip((main, *side), parts, strict=True):
        with torch.cuda.stream(stream):
            found.append(part())
    for stream in side:
        main.wait_stream(stream)
    return found


def overwrite(targets: Tensors, values: Tensors) -> None:
    """Copy each of ``values`` into the tensor of ``targets`` at its place, contiguous ones together."""
    into: list[Tensor] = []
    out_of: list[Tensor] = []
    for target, value in zip(targets, values, strict=True):
        if target.is_contiguous() and value.is_contiguous() and target.dtype == value.dtype:
            into.append(target)
            out_of.append(value)
        else:
            target.copy_(value)
    if into:
        torch._foreach_copy_(into, out_of)


def records(device: torch.device) -> bool:
    """Return whether ``replayed`` records what runs on ``device``."""
    return _RECORDINGS.active(device)


def capture(function: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
    """Record the kernels of ``function`` on the current accelerator; return how to launch them, and its results."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.current_stream()):  # which is restored when the capture fails
        pool = _RECORDINGS.pool
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"), _RECORDINGS.branches():
            results = function()
    _RECORDINGS.pool = graph.pool()
    return graph.replay, results


class _Recording:
    """Holds a recorded function with its inputs and outputs, which each replay overwrites."""

    def __init__(self, function: Function, fixed: tuple[Any, ...], tensors: Tensors):
        self.inputs = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
        self.replay, self.outputs = capture(lambda: function(*fixed, *self.inputs))

    @property
    def bytes(self) -> int:
        storages = (t.untyped_storage() for t in chain(self.inputs, self.outputs))
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    def run(self, tensors: Tensors) -> Tensors:
        overwrite(self.inputs, tensors)
        self.replay()
        return self.outputs


class Recordings:
    """Keeps recordings by function, fixed arguments and shapes; they share the memory of their temporaries."""

    def __init__(self) -> None:
        self.enabled = True
        self.pool: Any = None  # a handle of torch
        self.branching = False  # whether what runs now is being recorded, and may use several streams
        self._side_streams: list[Any] = []
        self._kept: OrderedDict[Hashable, _Recording | None] = OrderedDict()

    def active(self, device: torch.device) -> bool:
        """Return whether calls on ``device`` are recorded."""
        return self.enabled and device.type != "cpu"

    @contextmanager
    def branches(self) -> Iterator[None]:
        """Let ``side_by_side`` use several streams."""
        self.branching = BRANCHES
        try:
            yield
        finally:
            self.branching = False

    def side_streams(self, number: int) -> list[Any]:
        """Return as many streams beside the current one, the same ones every time."""
        while len(self._side_streams) < number:
            self._side_streams.append(torch.cuda.Stream())
        return self._side_streams[:number]

    def run(self, function: Function, fixed: tuple[Any, ...], tensors: Tensors) -> Tensors:
        """Return what ``function`` returns, recorded or not."""
        key = (function, fixed, *((t.shape, t.dtype, t.device) for t in tensors))
        if key not in self._kept:
            self._kept[key] = None
            return function(*fixed, *(t.contiguous() for t in tensors))
        found = self._kept[key]
        if found is None:
            try:
                found = _Recording(function, fixed, tensors)
            except RuntimeError as error:  # memory, or a function that waits for the device
                log.warning("kernels are launched one by one: %s could not be recorded (%s)", function, error)
                self.enabled = False
                self._kept.clear()
                return function(*fixed, *(t.contiguous() for t in tensors))
            self._kept[key] = found
            self._kept.move_to_end(key)
            self._shrink()
        self._kept.move_to_end(key)
        return found.run(tensors)

    def _shrink(self) -> None:
        """Drop the recordings that have not been used for longest until the rest fits."""
        taken = {key: r.bytes for key, r in self._kept.items() if r is not None}
        total = sum(taken.values())
        for key, size in list(taken.items())[:-1]:
            if total <= MOST_BYTES:
                break
            torch.accelerator.synchronize()  # it may be running
            self._kept[key] = None  # recorded again when it is next used
            total -= size


_RECORDINGS = Recordings()
