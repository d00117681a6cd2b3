"""Search strategies behind one protocol (search.types.Strategy), made by name."""

from search.strategies.factory import STRATEGIES, make_strategy

__all__ = ["STRATEGIES", "make_strategy"]
