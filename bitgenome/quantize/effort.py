"""Says how much text and search a model gets: the most that is forecast to end in the time there is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bitgenome.common.errors import UserError
from bitgenome.config.run import RunConfig
from bitgenome.plan.forecast import StageForecast, forecast, too_large
from bitgenome.plan.plan import Plan
from evaluators.probes.rates import Rates

RECOMMENDED = 80_000  # tokens of calibration, below which Hessians are noisy (text.tokens.calibration)


@dataclass(frozen=True)
class Effort:
    """Text in tokens, and evaluations. ``generations`` 0 is no search: the exact solution of the sensitivities."""

    name: str
    calibration: int
    sensitivity: int
    search: int
    validation: int
    test: int
    measure: str
    population: int = 0
    generations: int = 0
    healing: str = "auto"

    def settings(self, strategy: str | None) -> dict[str, Any]:
        """Return the settings; ``strategy`` is the one that was asked for, if any."""
        splits = ("calibration", "sensitivity", "search", "validation", "test")
        chosen = strategy or ("genetic" if self.generations else "exact")
        least = {"population": self.population, "generations": self.generations} if self.generations else {}
        if chosen != "exact" and not least:  # asked for, though there is hardly time for it
            least = {"population": LEAST_SEARCH[0], "generations": LEAST_SEARCH[1]}
        return {
            "text": {"tokens": {split: getattr(self, split) for split in splits}},
            "sensitivity": {"measure": self.measure},
            "search": {"strategy": chosen, **(least if chosen != "exact" else {})},
            "healing": {"enabled": self.healing},
        }


LEAST_SEARCH = (12, 4)
EFFORTS = (  # the most first
    Effort("thorough", 131072, 4096, 8192, 16384, 16384, "kl", 32, 24),
    Effort("standard", 98304, 4096, 8192, 16384, 16384, "kl", 20, 12),
    Effort("brief", 98304, 2048, 4096, 8192, 16384, "gradient", 16, 8),
    Effort("solved", 81920, 2048, 4096, 8192, 8192, "gradient"),
    Effort("short", 49152, 2048, 2048, 4096, 8192, "gradient"),
    Effort("least", 32768, 2048, 2048, 4096, 4096, "gradient", healing="off"),
)


@dataclass(frozen=True)
class Chosen:
    """An effort with its settings, and what a run of it will take."""

    effort: Effort
    config: RunConfig
    stages: Sequence[StageForecast]

    @property
    def seconds(self) -> float:
        """Forecast of the whole run."""
        return sum(stage.seconds for stage in self.stages)


def choose(plan: Plan, rates: Rates, workers: int, seconds: float, configured: Callable[[Effort], RunConfig]) -> Chosen:
    """Return the largest effort that is forecast to end within ``seconds``, else the least.

    One that takes more memory than there is gives way to a smaller one that does not. ``configured`` returns the
    configuration of an effort; only text, search and healing differ from that of ``plan``. Raises UserError if not even
    the least fits a worker's memory.
    """
    found: list[tuple[Chosen, int]] = []
    for effort in EFFORTS:
        config = configured(effort)
        smaller = replace(plan, config=config)
        try:
            stages = forecast(smaller, rates, workers)
        except UserError:
            if effort is EFFORTS[-1] and not found:
                raise
            continue
        found.append((Chosen(effort, config, stages), len(too_large(smaller, stages))))
    in_time = [pair for pair in found if pair[0].seconds <= seconds] or found[-1:]
    return min(in_time, key=lambda pair: pair[1])[0]


def merged(settings: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return two nested mappings as one; where both have a value, that of ``others``."""
    found = dict(settings)
    for key, value in others.items():
        old = found.get(key)
        found[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return found
