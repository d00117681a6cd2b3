"""Screening of offspring: which of a brood to evaluate, and whether the surrogate behind that choice can be trusted.

The surrogate's predictions are recorded before the evaluation and compared with what was measured. A few slots of every
generation are filled without it: the losses of chosen offspring alone are too similar to judge the predictions by. If
the order predicted in the last generations is no better than chance, all slots are filled without it. Predictions are
still made and compared, and screening resumes once they hold.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from search.allocation.sensitivity import SensitivityTable
from search.strategies.surrogate import Surrogate, log_loss, usable
from search.types import Fidelity, Genome, Scored

UNSCREENED = 0.15  # share of a generation's slots that are filled without the surrogate, at least one of them
OPTIMISM = 1.0  # an offspring is valued at its predicted mean minus this many standard deviations
JUDGED = 3  # latest generations by which the surrogate is judged
FEWEST_JUDGED = 2  # with fewer judged generations the surrogate is trusted
SIGNIFICANT = 1.645  # standard deviations above zero of the pooled rank correlation: one-sided, 5 %
PRIOR_ERRORS = 20  # weight of the leave-one-out calibration, in predicted evaluations
ONE_SIGMA = 0.6827
DIGITS = 6  # decimals of a predicted log loss that are compared: another BLAS rounds the rest differently


@dataclass(frozen=True)
class GenerationScore:
    """A score says how well the predictions for one generation's offspring held."""

    offspring: int  # with a prediction and a usable loss
    correlation: float  # Spearman's, predicted against measured
    coverage: float  # share of measured log losses within one predicted standard deviation
    spread: float  # the factor on the leave-one-out standard deviations that would have covered ONE_SIGMA
    screened: bool


class Screening:
    """Chooses the offspring to evaluate, and judges the choice by what was measured.

    Call ``choose`` before a generation is evaluated, and ``learn`` after it.
    """

    def __init__(self, table: SensitivityTable | None) -> None:
        self._table = table
        self.scores: list[GenerationScore] = []
        self.latest: GenerationScore | None = None  # of the last batch; None if it was not predicted
        self._pending: list[tuple[float, float]] = []  # mean and deviation of the batch's first genomes, uncalibrated
        self._fidelity: Fidelity | None = None  # text that they were predicted for

    @property
    def active(self) -> bool:
        """Whether the surrogate chooses offspring: first it does, later only if its predictions beat chance."""
        judged = self.scores[-JUDGED:]
        freedom = sum(score.offspring - 1 for score in judged)
        if len(judged) < FEWEST_JUDGED or not freedom:
            return True
        pooled = sum((score.offspring - 1) * score.correlation for score in judged) / math.sqrt(freedom)
        return pooled > SIGNIFICANT

    def choose(self, brood: list[Genome], places: int, told: Sequence[Scored]) -> list[Genome]:
        """Return ``places`` offspring, one from each of as many strata of ``brood``.

        The strata keep one error of the surrogate from filling all slots. ``told`` are the evaluations so far; if none
        is usable, the first offspring of each stratum is returned.
        """
        strata = np.array_split(np.arange(len(brood)), places)
        first = [int(stratum[0]) for stratum in strata]
        told = usable(told)
        if not told:
            return [brood[i] for i in first]
        self._fidelity = max((s.fidelity for s in told if s.fidelity.draw == told[-1].fidelity.draw), key=astuple)
        prediction = Surrogate(told, self._table)(brood, self._fidelity)
        value = np.round(prediction.mean - OPTIMISM * self._calibration() * prediction.deviation, DIGITS)
        left = max(1, round(UNSCREENED * places)) if self.active else places
        best = [int(stratum[np.argmin(value[stratum])]) for stratum in strata]
        chosen = first[:left] + best[left:]
        self._pending = [(float(prediction.mean[i]), float(prediction.deviation[i])) for i in chosen]
        return [brood[i] for i in chosen]

    def learn(self, batch: Sequence[Scored]) -> None:
        """Compare what was predicted of the first genomes of ``batch`` with their losses."""
        predicted, self._pending, self.latest = self._pending, [], None
        pairs = [(p, s) for p, s in zip(predicted, batch, strict=False) if usable([s])]
        if len(pairs) > 1:
            self.latest = self._score(np.array([p for p, _ in pairs]), [s for _, s in pairs])
            self.scores.append(self.latest)

    def state_dict(self) -> dict[str, Any]:
        """Return the JSON-serializable state; its ``scores`` have one entry for every generation that was predicted."""
        return {
            "scores": [asdict(score) for score in self.scores],
            "predicted": [list(pair) for pair in self._pending],
            "fidelity": None if self._fidelity is None else list(astuple(self._fidelity)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self.scores = [GenerationScore(**record) for record in state["scores"]]
        self._pending = [(mean, deviation) for mean, deviation in state["predicted"]]
        self._fidelity = None if state["fidelity"] is None else Fidelity(*state["fidelity"])

    def _calibration(self) -> float:
        """Return a factor on predicted standard deviations: how far off predictions of the judged generations were."""
        judged = [(score.offspring, score.spread) for score in self.scores[-JUDGED:]]
        return float(np.average([1.0, *(s for _, s in judged)], weights=[PRIOR_ERRORS, *(n for n, _ in judged)]))

    def _score(self, predicted: np.ndarray, measured: list[Scored]) -> GenerationScore:
        """Score ``predicted`` (n, 2), means and deviations, against what was measured.

        A genome that read more text was found better, and is ranked first.
        """
        order = sorted((-scored.fidelity.tokens, scored.loss) for scored in measured)
        ranks = rankdata([order.index((-scored.fidelity.tokens, scored.loss)) for scored in measured])
        errors = self._errors(predicted[:, 0], measured) / predicted[:, 1]
        return GenerationScore(
            offspring=len(measured),
            correlation=_correlation(rankdata(np.round(predicted[:, 0], DIGITS)), ranks),
            coverage=float(np.mean(errors <= self._calibration())),
            spread=float(np.quantile(errors, ONE_SIGMA)),
            screened=self.active,
        )

    def _errors(self, mean: np.ndarray, measured: list[Scored]) -> np.ndarray:
        """Return the absolute errors (n,) of the predicted log losses.

        On text other than predicted for, errors are taken around their mean, because the level of that text is unknown.
        """
        errors = log_loss([scored.loss for scored in measured]) - mean
        for fidelity in {scored.fidelity for scored in measured} - {self._fidelity}:
            there = np.array([scored.fidelity == fidelity for scored in measured])
            errors[there] -= errors[there].mean()
        return np.abs(errors)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Pearson's correlation, or 0 if one side does not vary."""
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else 0.0
