"""What each part of the search earns: held-out KL of its incumbent against the tokens that its candidates have read.

Every variant leaves out one part: the exact solutions as seeds (random founders instead), the ladder (all genomes read
as much as finalists), the refresh of text (one draw a search seed) or the surrogate (``brood: 1``); "default" has
neither ladder nor refresh. All stop at the same number of tokens, on one bank and one evaluator. Sensitivities, which
the seeds, repairs and the surrogate's mean take, are measured once and not counted.

    OMP_NUM_THREADS=1 python -m benchmarks.ablation [--seeds 5] [--bits 3.5] [--tokens 320000] [--variants default ...]

Every evaluation goes to an archive under ``--storage``, and every finished run to a file there: stop it at any point
and start it again.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bitgenome.common.files import atomic_write_json
from bitgenome.config.run import RunConfig, absolute_paths, parse_config
from bitgenome.observe.progress import track
from bitgenome.plan.plan import make_plan
from bitgenome.plan.text import read_windows
from bitgenome.run.prepare import Artefacts, prepare
from bitgenome.run.search import pool_evaluate
from bitgenome.storage.run_directory import RunDirectory
from search.allocation.seeds import seed_genomes
from search.loop.archive import EvaluationLog
from search.loop.checkpoint import Checkpoint
from search.loop.ladder import Ladder
from search.loop.paired import Estimate
from search.loop.search import Evaluate, Progress, evaluate_missing, run_search
from search.loop.winner import choose_winner, search_best
from search.strategies.factory import make_strategy
from search.strategies.settings import GeneticSettings
from search.types import Evaluation, Fidelity, Genome
from workers.pool.base import SerialPool

CONFIG = {
    "model": "models/stdlib-6m",
    "levels": "fine",
    "text": {
        "window": 256,
        "tokens": {"calibration": 98304, "sensitivity": 2048, "search": 16384, "validation": 4096, "test": 8192},
    },
}
POPULATION = 16
BROOD = 16
RUNGS = (512, 2048)  # tokens; without a ladder the last alone
PROMOTION = 0.25
REFRESH = 2  # generations
ENDLESS = 10**6  # generations: more than any run here has
MARKS = (0.25, 0.5, 0.75, 1.0)  # of the tokens, at which incumbents are looked at
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Variant:
    seeds: bool = True
    ladder: bool = True
    refresh: bool = True
    surrogate: bool = True


VARIANTS = {
    "everything": Variant(),
    "no seeds": Variant(seeds=False),
    "no ladder": Variant(ladder=False),
    "no refresh": Variant(refresh=False),
    "no surrogate": Variant(surrogate=False),
    "default": Variant(ladder=False, refresh=False),
}


class TokensSpentError(Exception):
    """The tokens of a run are spent."""


class Meter:
    """An ``Evaluate`` that counts the tokens it was asked to read, and answers from ``archive`` what that holds."""

    def __init__(self, evaluate: Evaluate, archive: EvaluationLog) -> None:
        self._evaluate, self._archive = evaluate, archive
        self.tokens = 0

    def __call__(self, genomes: Sequence[Genome], fidelity: Fidelity) -> Iterator[Evaluation]:
        self.tokens += len(genomes) * fidelity.tokens
        return iter(evaluate_missing(genomes, fidelity, self._evaluate, self._archive))


def incumbents(variant: Variant, seed: int, limit: int, artefacts: Artefacts, meter: Meter) -> dict[str, Genome]:
    """The best genome on the search's own text at each mark, and the one that validation text chooses at the end."""
    config, space, budget = artefacts.plan.config, artefacts.plan.space, artefacts.plan.budget
    tables = artefacts.tables
    seeds = seed_genomes(space, budget, tables)
    settings = GeneticSettings(
        population=POPULATION, generations=ENDLESS, brood=BROOD if variant.surrogate else 1, seed=seed
    )
    strategy = make_strategy(
        "genetic", space, budget, tables=tables, seeds=seeds if variant.seeds else {}, settings=settings
    )
    rungs = RUNGS if variant.ladder else RUNGS[-1:]
    ladder = Ladder(rungs, PROMOTION, REFRESH if variant.refresh else ENDLESS, seed)
    history: list[tuple[int, Genome]] = []

    def note(progress: Progress) -> None:
        before = history[-1][0] if history else 0
        history.append((meter.tokens, progress.best.genome))
        if 2 * meter.tokens - before > limit:  # another generation like this one would be too much
            raise TokensSpentError

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint(Path(folder) / "checkpoint.json", "ablation")
        with closing(EvaluationLog(Path(folder) / "evaluations.jsonl")) as log:
            with suppress(TokensSpentError):
                run_search(strategy, meter, log, ladder, checkpoint=checkpoint, on_progress=note)
            validation = Fidelity("validation", config.text.tokens.validation)
            own = {"incumbent": search_best(log, ladder, 1)[0]}
            references = seeds if variant.seeds else own
            best = choose_winner(log, meter, ladder=ladder, validation=validation, references=references, keep=4)
    reached = {
        f"{share:.0%}": [genome for tokens, genome in history if tokens <= share * limit][-1:] for share in MARKS
    }
    return {mark: genomes[0] for mark, genomes in reached.items() if genomes} | {"chosen": best.evaluation.genome}


def measured(found: dict[str, Genome], test: Fidelity, meter: Meter) -> dict[str, float]:
    """KL on test text by mark."""
    kl = {evaluation.genome: evaluation.kl for evaluation in meter(list(dict.fromkeys(found.values())), test)}
    return {mark: kl[genome] for mark, genome in found.items()}


def prepared(storage: Path, bits: float) -> Artefacts:
    """Bank and sensitivities, made once for all budgets."""
    own = {"name": f"ablation-{bits:g}", "storage_path": str(storage), "budget": {"bits_per_weight": bits}}
    config: RunConfig = absolute_paths(parse_config({**CONFIG, **own}, "the ablation"))
    plan = make_plan(config)
    return prepare(plan, read_windows(plan), RunDirectory.create(config), SerialPool(), no_bar)


def no_bar(items: Any, total: int, what: str) -> Iterator[Any]:
    return iter(items)


def table_of(results: dict[str, dict[int, dict[str, float]]], exact: float, title: str) -> Table:
    """Mean KL at each mark, and the chosen genome's difference to ``everything`` of the same seeds, with intervals."""
    marks = [f"{share:.0%}" for share in MARKS] + ["chosen"]
    table = Table(title=title, title_justify="left")
    for column in ("variant", "seeds", *marks, "to everything", "to exact"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    base = results.get("everything", {})
    for name, runs in results.items():
        cells = [interval([run[mark] for run in runs.values() if mark in run], 1e3) for mark in marks]
        shared = [runs[seed]["chosen"] / base[seed]["chosen"] - 1 for seed in runs if seed in base]
        beside = "" if name == "everything" else interval(shared, 100, " %")
        over_exact = interval([run["chosen"] / exact - 1 for run in runs.values()], 100, " %")
        table.add_row(name, str(len(runs)), *cells, beside, over_exact)
    return table


def interval(values: Sequence[float], unit: float, suffix: str = "") -> str:
    """Mean and half of its interval by Student's t, times ``unit``."""
    if not values:
        return ""
    estimate = Estimate.of(unit * np.array(values))
    half = f" ± {estimate.margin(CONFIDENCE):.2f}" if len(values) > 1 else ""
    return f"{estimate.mean:.2f}{half}{suffix}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--bits", type=float, default=3.5, help="per weight of the whole file")
    parser.add_argument("--tokens", type=int, default=320_000, help="that the candidates of one run read")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--storage", type=Path, default=Path("runs"))
    args = parser.parse_args()
    console = Console()
    artefacts = prepared(args.storage, args.bits)
    setup, pool = artefacts.setup, SerialPool()
    test = Fidelity("test", artefacts.plan.config.text.tokens.test)
    folder = args.storage / "ablation" / f"{setup.key[:12]}-{args.tokens}"
    results: dict[str, dict[int, dict[str, float]]] = {}
    with closing(EvaluationLog(folder.parent / f"{setup.key[:12]}.jsonl")) as archive:
        evaluate = pool_evaluate(setup, pool, no_bar, "", archive)
        runs = [(seed, name) for seed in range(args.seeds) for name in args.variants]
        for seed, name in track(runs, len(runs), "ablation", console):
            file = folder / f"{name.replace(' ', '-')}-{seed}.json"
            if not file.is_file():
                meter = Meter(evaluate, archive)
                found = incumbents(VARIANTS[name], seed, args.tokens, artefacts, meter)
                file.parent.mkdir(parents=True, exist_ok=True)
                atomic_write_json(file, measured(found, test, meter))
            results.setdefault(name, {})[seed] = json.loads(file.read_text(encoding="utf-8"))
        seeds = seed_genomes(setup.space, artefacts.plan.budget, artefacts.tables[:1])
        exact = measured({"exact": seeds["exact kl"]}, test, Meter(evaluate, archive))["exact"]
    title = (
        f"{args.bits:g} bits per weight: KL x 1000 on {test.tokens:,} tokens of test text (± {CONFIDENCE:.0%} over "
        f"search seeds), at shares of {args.tokens:,} tokens; exact seed {1e3 * exact:.2f}"
    )
    console.print(table_of(results, exact, title))


if __name__ == "__main__":
    main()
