"""This module times single calls, on any device."""

import time
from collections.abc import Callable
from typing import Any

import torch

PROBE_SECONDS = 0.03  # a probe is repeated until it has taken that long
PRODUCT_SIDE = 1024  # rows and columns of the product that stands for others


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Return the least seconds of one call of ``work``, a first one left out unless it is a long one."""
    taken: list[float] = []
    while len(taken) < 2 or (sum(taken) < PROBE_SECONDS and len(taken) < 50):
        taken.append(timed(work, device))
        if taken[0] > 20 * PROBE_SECONDS:  # warming up hardly counts
            break
    return min(taken[1:] or taken)


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call of ``work``, until the device's queue is empty."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def product_flops(device: torch.device) -> float:
    """Return the operations per second of a float32 product on ``device``."""
    a = torch.randn(PRODUCT_SIDE, PRODUCT_SIDE, device=device)
    return 2 * PRODUCT_SIDE**3 / seconds_of(lambda: a @ a, device)
