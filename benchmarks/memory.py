"""Peak memory of a search against what is predicted for it, resident and streamed, by depth; and its time.

Each case is a genetic search of two generations over a random model, in a process of its own. A streamed one runs under
a limit that its decoded weights exceed, so that what does not fit would fail: on the memory of a control group (a
folder of /sys/fs/cgroup that one may write to), or else on the addresses that the process may write to (ulimit -d).

    OMP_NUM_THREADS=1 python -m benchmarks.memory [--layers 4 8 16 32] [--genomes 8] [--tokens 4096] [--limit-mib 320]
        [--cgroup /sys/fs/cgroup/memory/bitgenome]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.synthetic import WINDOW, synthetic_setup
from evaluators.engine.evaluator import GenomeEvaluator
from evaluators.engine.memory import Load
from search.budget import Budget
from search.loop.archive import EvaluationLog
from search.loop.checkpoint import Checkpoint
from search.loop.ladder import Ladder
from search.loop.search import run_search
from search.strategies.factory import make_strategy
from search.strategies.settings import GeneticSettings
from search.types import Evaluation, Fidelity, Genome

RESULT_FILE = "memory.json"
SLACK = 0.15  # of the limit, which the prediction may be wrong by
ADDRESS_FACTOR = 2  # of the limit: addresses that are mapped and no longer or never in memory count under ulimit -d
GENERATIONS = 2


def status_bytes(field: str) -> int:
    """A size from this process's status: VmHWM, the most it ever held, or VmData, what it may write to."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def search(evaluator: GenomeEvaluator, genomes: int, tokens: int, path: Path) -> int:
    """A genetic search from nothing; the number of evaluations."""
    space = evaluator.space
    budget = Budget((space.file_bytes(space.smallest()) + space.file_bytes(space.largest())) // 2)
    settings = GeneticSettings(population=genomes, generations=GENERATIONS)
    strategy = make_strategy("genetic", space, budget, seeds={}, settings=settings)

    def evaluate(asked: Sequence[Genome], fidelity: Fidelity) -> Iterator[Evaluation]:
        return iter(evaluator.evaluate(asked, fidelity))

    with tempfile.TemporaryDirectory(dir=path) as folder, closing(EvaluationLog(Path(folder) / "log.jsonl")) as log:
        run_search(strategy, evaluate, log, Ladder((tokens,)), checkpoint=Checkpoint(Path(folder) / "c.json", ""))
        return len(log)


def confine(limit: int, cgroup: str | None) -> None:
    """Let this process take ``limit`` bytes above what it has, and no more."""
    if cgroup is None:
        bound = status_bytes("VmData") + ADDRESS_FACTOR * limit
        resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
        return
    group = Path(cgroup)
    old, new = group / "memory.limit_in_bytes", group / "memory.max"  # of the first and second version
    (old if old.is_file() else new).write_text(str(limit), encoding="utf-8")
    (group / "cgroup.procs").write_text(str(os.getpid()), encoding="utf-8")  # what it has already counts elsewhere


def measure(
    path: Path, layers: int, genomes: int, tokens: int, limit: int | None, cgroup: str | None = None
) -> dict[str, float]:
    """Bytes and seconds of a search, in this process."""
    setup = synthetic_setup(path, layers, tokens, Load(genomes, tokens, 0), limit)
    evaluator = GenomeEvaluator(setup)
    base = psutil.Process().memory_info().rss
    if limit is not None:
        confine(limit, cgroup)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the mark starts anew
    started = time.perf_counter()
    evaluations = search(evaluator, genomes, tokens, path)
    memory = evaluator.memory
    return {
        "seconds": time.perf_counter() - started,
        "evaluations": evaluations,
        "measured": status_bytes("VmHWM") - base,
        "predicted": memory.peak,
        "resident": memory.resident,
        "windows": evaluator.sweep.batches.windows,
        "all_weights": memory.all_weights,
    }


def measured_apart(case: dict[str, Any]) -> dict[str, float]:
    """``measure`` in a new process. Raises RuntimeError with what it wrote if it fails."""
    synthetic_setup(Path(case["path"]), case["layers"], case["tokens"], Load(1, WINDOW, 0))  # made outside the limit
    command = [sys.executable, "-m", "benchmarks.memory", "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, float] = json.loads((Path(case["path"]) / RESULT_FILE).read_text(encoding="utf-8"))
    return found


def answer_case(text: str, measure: Callable[..., dict[str, Any]]) -> None:
    """Write what ``measure`` finds for a case, given as JSON by the process that waits for it, beside its model."""
    case = json.loads(text)
    path = Path(case["path"])
    (path / RESULT_FILE).write_text(json.dumps(measure(**case | {"path": path})), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--genomes", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8 * WINDOW)
    parser.add_argument("--limit-mib", type=int, default=320)
    parser.add_argument("--cgroup", type=str, default=None)
    parser.add_argument("--storage", type=Path, default=None)
    parser.add_argument("--case", type=str, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        answer_case(arguments.case, measure)
        return
    what = f"{GENERATIONS} generations of {arguments.genomes}, {arguments.tokens:,} tokens"
    table = Table(title=f"{what}; MiB above the libraries' own")
    for column in ("", "blocks", "weights, all formats", "limit", "predicted", "measured", "ratio", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    console = Console(width=120)
    storage = arguments.storage or Path(tempfile.mkdtemp())
    for limit in (None, arguments.limit_mib << 20):
        for layers in arguments.layers:
            case = {"path": str(storage / str(layers)), "layers": layers, "limit": limit}
            case |= {"genomes": arguments.genomes, "tokens": arguments.tokens, "cgroup": arguments.cgroup}
            found = measured_apart(case)
            console.print(f"{layers} blocks, limit {limit}: {found}")
            mib = {key: f"{found[key] / 2**20:.0f}" for key in ("all_weights", "predicted", "measured")}
            table.add_row(
                "resident" if found["resident"] else "streamed", str(layers), mib["all_weights"],
                "-" if limit is None else str(limit >> 20), mib["predicted"], mib["measured"],
                f"{found['predicted'] / found['measured']:.2f}", f"{found['seconds']:.1f}",
            )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
