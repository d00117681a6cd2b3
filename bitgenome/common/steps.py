"""Tells how far a long piece of work has come, to whoever listens in this process.

What works goes through its parts with ``steps``; what shows progress, or passes it on, calls the work within
``heard_by``. Without a listener nothing happens.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """Says that ``done`` of ``total`` parts of a task are done; ``unit`` names one part, such as block or tensor."""

    done: int
    total: int
    unit: str

    @property
    def fraction(self) -> float:
        """Share of the parts that is done."""
        return self.done / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"{self.unit} {min(self.done + 1, self.total):,} of {self.total:,}"


Listener = Callable[[Sequence[Step]], None]  # takes the last step of every task that runs
_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def heard_by(listener: Listener | None) -> Iterator[None]:
    """Let ``listener`` hear all steps while the context lasts; None: nobody hears them."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def tell(running: Sequence[Step]) -> None:
    """Tell the listener, if there is one, the last step of every task that runs."""
    if running and (listener := _LISTENER.get()):
        listener(running)


def steps(items: Iterable[T], total: int, unit: str, done: int = 0) -> Iterator[T]:
    """Yield ``items``, and tell before each how many of ``total`` are done.

    ``unit`` names one item; ``done`` were done before the first. Loops within the loop should not tell their steps too:
    the last step told counts.
    """
    for number, item in enumerate(items, start=done):
        tell([Step(number, total, unit)])
        yield item
    tell([Step(total, total, unit)])
