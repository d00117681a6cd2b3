"""The only place that names accelerators, and how many cores a computation takes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def best_device() -> torch.device:
    """cuda where there is one, else cpu. Not mps yet: it has no float64, which Hessians are factored in."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """torch computes with that many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
