"""A module that answers with what it computed last."""

from types import TracebackType
from typing import Any, Self

from torch import nn


class Replay:
    """While open, ``module`` computes once and then answers the same, whatever it is asked, until ``forget``.

    None stands for no module at all.
    """

    def __init__(self, module: nn.Module | None):
        self._module = module
        self._answer: Any = None

    def __enter__(self) -> Self:
        if self._module is not None:
            self._compute = self._module.forward
            self._module.forward = self._forward
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.forget()
        if self._module is not None:
            del self._module.forward

    def forget(self) -> None:
        self._answer = None

    def _forward(self, *arguments: Any, **named: Any) -> Any:
        if self._answer is None:
            self._answer = self._compute(*arguments, **named)
        return self._answer
