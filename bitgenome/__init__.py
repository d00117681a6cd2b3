"""Search mixed-precision GGUF quantizations from Python: what is searched is what ships.

``config = bitgenome.load_config("run.yaml")``, ``bitgenome.plan(config)``, ``run = bitgenome.run(config)`` or
``bitgenome.Run.open("runs/NAME")``, then ``run.evaluations()``, ``run.front()``, ``run.best``, ``run.export()``. What
the user can fix is raised as ``bitgenome.UserError``. Importing this module imports nothing heavy: the rest comes with
the first use.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitgenome.api.entry import load_config, plan, run
    from bitgenome.api.run import Best, Run
    from bitgenome.common.errors import UserError
    from bitgenome.config.run import RunConfig
    from bitgenome.plan.plan import Plan

__all__ = ["Best", "Plan", "Run", "RunConfig", "UserError", "load_config", "plan", "run"]

_HOMES = {
    "load_config": "bitgenome.api.entry",
    "Best": "bitgenome.api.run",
    "Run": "bitgenome.api.run",
    "UserError": "bitgenome.common.errors",
    "RunConfig": "bitgenome.config.run",
    "Plan": "bitgenome.plan.plan",
}


class _Room(ModuleType):
    """A room that has the name of a function: called, it is that function of bitgenome.api.entry."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        function = getattr(import_module("bitgenome.api.entry"), self.__name__.rpartition(".")[2])
        return function(*arguments, **named)


for _name in ("plan", "run"):
    import_module(f"{__name__}.{_name}").__class__ = _Room


def __getattr__(name: str) -> Any:
    """Return what ``__all__`` names, imported when it is first used. Raises AttributeError."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Return the names for whoever completes them."""
    return __all__
