"""Writes evaluations as trials of Optuna's, into a journal file that optuna-dashboard and JournalStorage open."""

import warnings
from collections.abc import Sequence
from datetime import timedelta
from math import isfinite
from pathlib import Path

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from bitgenome.common.errors import UserError
from bitgenome.common.files import replacing
from search.types import Evaluation, Fidelity, SearchSpace

OBJECTIVES = ("loss", "kl", "perplexity", "logit_mse", "reconstruction", "file_bytes", "seconds")


def write_journal(
    path: Path, run: str, space: SearchSpace, evaluations: Sequence[Evaluation], objectives: Sequence[str]
) -> list[str]:
    """Write ``evaluations`` of the run named ``run`` to ``path``, and return the studies' names, one for each text.

    A trial's parameters are the type of each gene; its values are ``objectives``, all minimized and named as metrics;
    all figures are user attributes. A trial ends at the time of writing, and has taken the seconds of its evaluation.
    One without finite values has failed. An earlier file is replaced when the new one is whole.
    Raises UserError.
    """
    if not objectives or not set(objectives) <= set(OBJECTIVES):
        raise UserError(f"expected objectives of {', '.join(OBJECTIVES)}, found {', '.join(objectives) or 'none'}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"expected a folder for the file, found none at {path.absolute().parent}")
    if not evaluations:
        raise UserError(f"expected a run that has evaluated something, found nothing in {run}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {gene.name: CategoricalDistribution([f.name for f in gene.formats]) for gene in space.genes}
    texts = dict.fromkeys(evaluation.fidelity for evaluation in evaluations)
    with replacing(path) as temporary:
        storage = JournalStorage(JournalFileBackend(str(temporary)))
        for text in texts:
            study = optuna.create_study(
                storage=storage, study_name=study_name(run, text), directions=["minimize"] * len(objectives)
            )
            with warnings.catch_warnings(category=ExperimentalWarning, action="ignore"):
                study.set_metric_names(list(objectives))
            study.set_user_attr("text", {"split": text.split, "tokens": text.tokens, "draw": text.draw})
            study.add_trials([trial(e, space, distributions, objectives) for e in evaluations if e.fidelity == text])
    return [study_name(run, text) for text in texts]


def study_name(run: str, text: Fidelity) -> str:
    """Return the name of the study of what ``run`` measured on ``text``."""
    if not text.tokens:
        return f"{run}: without text"
    return f"{run}: {text.tokens} tokens of {text.split} text" + (f", draw {text.draw}" if text.draw else "")


def trial(
    evaluation: Evaluation,
    space: SearchSpace,
    distributions: dict[str, CategoricalDistribution],
    objectives: Sequence[str],
) -> FrozenTrial:
    """Return one evaluation as a trial that has ended."""
    figures = {name: getattr(evaluation, name) for name in OBJECTIVES}
    values = [float(figures[name]) for name in objectives]
    whole = all(map(isfinite, values))
    found = create_trial(
        state=TrialState.COMPLETE if whole else TrialState.FAIL,
        values=values if whole else None,
        params={g.name: g.formats[c].name for g, c in zip(space.genes, evaluation.genome, strict=True)},
        distributions=dict(distributions),
        user_attrs={name: value for name, value in figures.items() if isfinite(value)},
    )
    if found.datetime_complete and isfinite(evaluation.seconds):
        found.datetime_start = found.datetime_complete - timedelta(seconds=evaluation.seconds)
    return found
