"""Peak memory of a sweep against what is predicted for it, resident and streamed, by depth; and its time.

Each case runs in a process of its own. A streamed one is held by a limit on the process's address space (ulimit -v),
which its weights, decoded, exceed: what fits not would fail.

    OMP_NUM_THREADS=1 python -m benchmarks.memory [--layers 4 8 16 32] [--genomes 8] [--tokens 4096] [--limit-mib 320]
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.synthetic import WINDOW, synthetic_setup
from evaluators.evaluator import GenomeEvaluator
from evaluators.memory import Load
from search.types import Fidelity

RESULT_FILE = "memory.json"
ADDRESS_SLACK = 256 << 20  # address space that is mapped and not used: threads, files at work


def peak_bytes() -> int:
    """High-water mark of this process's memory."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


def measure(path: Path, layers: int, genomes: int, tokens: int, limit: int | None) -> dict[str, float]:
    """Bytes and seconds of one generation of random genomes, in this process."""
    setup = synthetic_setup(path, layers, tokens, Load(genomes, tokens, 0), limit)
    evaluator = GenomeEvaluator(setup)
    warm_up = torch.randn(512, 512)
    (warm_up @ warm_up).sum().item()
    base = psutil.Process().memory_info()
    if limit is not None:
        bound = base.vms + limit + ADDRESS_SLACK
        resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the mark starts anew
    rng, genes = random.Random(0), len(setup.space.genes)
    generation = [tuple(rng.randrange(2) for _ in range(genes)) for _ in range(genomes)]
    started = time.perf_counter()
    evaluator.evaluate(generation, Fidelity("search", tokens))
    seconds = time.perf_counter() - started
    memory = asdict(evaluator.memory)
    return {
        "seconds": seconds,
        "measured": peak_bytes() - base.rss,
        "predicted": evaluator.memory.peak,
        "resident": evaluator.memory.resident,
        "windows": evaluator.sweep.batches.windows,
        **{name: memory[name] for name in ("states", "reference", "work", "weights", "all_weights")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--genomes", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8 * WINDOW)
    parser.add_argument("--limit-mib", type=int, default=320)
    parser.add_argument("--storage", type=Path, default=None)
    parser.add_argument("--case", type=str, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        case = json.loads(arguments.case)
        found = measure(**case | {"path": Path(case["path"])})
        (Path(case["path"]) / RESULT_FILE).write_text(json.dumps(found), encoding="utf-8")
        return
    table = Table(title=f"{arguments.genomes} genomes, {arguments.tokens:,} tokens, MiB above the libraries' own")
    for column in ("", "blocks", "weights, all formats", "limit", "predicted", "measured", "ratio", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    storage = arguments.storage or Path(tempfile.mkdtemp())
    for limit in (None, arguments.limit_mib << 20):
        for layers in arguments.layers:
            case = {"path": str(storage / str(layers)), "layers": layers, "limit": limit}
            case |= {"genomes": arguments.genomes, "tokens": arguments.tokens}
            command = [sys.executable, "-m", "benchmarks.memory", "--case", json.dumps(case)]
            synthetic_setup(Path(str(case["path"])), layers, arguments.tokens, Load(1, WINDOW, 0))  # made outside
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr)
            found = json.loads((Path(str(case["path"])) / RESULT_FILE).read_text(encoding="utf-8"))
            mib = {key: f"{found[key] / 2**20:.0f}" for key in ("all_weights", "predicted", "measured")}
            table.add_row(
                "resident" if found["resident"] else "streamed", str(layers), mib["all_weights"],
                "-" if limit is None else str(limit >> 20), mib["predicted"], mib["measured"],
                f"{found['predicted'] / found['measured']:.2f}", f"{found['seconds']:.1f}",
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
