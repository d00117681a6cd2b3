"""Files of the whole pipeline against llama.cpp's own files, at equal bytes, all run by llama.cpp on the same text.

llama.cpp's files are made by its own llama-quantize with an importance matrix from the same calibration text; the
search gets budgets between 3 and 5 bits per weight. Ours over theirs is KL over the lower hull of theirs (log KL over
bytes) at our file's exact size.

    LLAMA_CPP_BIN=.../build/bin python -m benchmarks.llamacpp_hull [--config configs/core/levels-all.yaml]
        [--bits 3.0 --bits 4.0] [--set KEY=VALUE] [--json out.json]
"""

import argparse
import json
import logging
import math
import os
import subprocess
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table
from scipy.spatial import ConvexHull

from benchmarks.float_gguf import export_float
from bitgenome.common import layout
from bitgenome.config.run import RunConfig, load_config
from bitgenome.plan.plan import make_plan
from bitgenome.run.outcome import Outcome
from bitgenome.run.pipeline import run
from bitgenome.run.proof import Proof, prove
from evaluators.data.windows import TokenWindows

THEIRS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M")
BITS = (3.0, 3.5, 4.0, 4.5, 5.0)


def lower_hull(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The (bytes, KL) of ``points`` on the lower convex hull of log KL over bytes, smallest file first."""
    logs = [(size, math.log(kl)) for size, kl in points]
    hull = ConvexHull(logs)
    below = {
        i for simplex, equation in zip(hull.simplices, hull.equations, strict=True) if equation[1] < 0 for i in simplex
    }
    return sorted(points[i] for i in below)


def hull_at(hull: list[tuple[int, float]], size: int) -> float:
    """KL of the hull at ``size`` bytes, log-linear between its corners. Raises ValueError outside them."""
    for (a, kl_a), (b, kl_b) in pairwise(hull):
        if a <= size <= b:
            return math.exp(math.log(kl_a) + (size - a) / (b - a) * (math.log(kl_b) - math.log(kl_a)))
    raise ValueError(f"expected a size from {hull[0][0]:,} to {hull[-1][0]:,} bytes, found {size:,}")


def their_files(reference: Outcome, config: RunConfig, directory: Path) -> dict[str, Proof]:
    """llama-quantize's own file of each type, proved on the test text of ``reference``."""
    folder = make_plan(config).folder
    quantize = Path(os.environ["LLAMA_CPP_BIN"]) / "llama-quantize"
    text = TokenWindows.load(reference.run / layout.WINDOWS)
    full = config.template or directory / "full.gguf"
    if config.template is None:
        export_float(folder, full)
    proofs = {}
    for name in THEIRS:
        file = directory / f"{name}.gguf"
        command = [quantize, "--imatrix", reference.run / layout.IMATRIX, full, file, name, "2"]
        subprocess.run(command, check=True, capture_output=True)
        proofs[name] = prove(file, folder, text, layout=make_plan(config).file)
        logging.info("%s: %s bytes, KL %.6f", name, f"{proofs[name].file_bytes:,}", proofs[name].figures.mean_kl.value)
    return proofs


def at_budget(config: RunConfig, bits: float, console: Console) -> Outcome:
    budget = config.budget.model_copy(update={"bits_per_weight": bits, "file_size": None, "compression_ratio": None})
    return run(config.model_copy(update={"name": f"{config.name}-{bits:g}", "budget": budget}), console)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/core/levels-all.yaml"))
    parser.add_argument("--bits", type=float, action="append")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    console, config = Console(), load_config(args.config, args.overrides)
    ours = {bits: at_budget(config, bits, console) for bits in args.bits or BITS}
    directory = config.storage_path / "llamacpp"
    directory.mkdir(exist_ok=True)
    theirs = their_files(next(iter(ours.values())), config, directory)
    hull = lower_hull([(p.file_bytes, p.figures.mean_kl.value) for p in theirs.values()])
    weights = make_plan(config).space.weights
    table = Table(title="KL by llama.cpp on held-out text", title_justify="left")
    for column in ("file", "bytes", "bits per weight", "KL", "perplexity", "KL over hull"):
        table.add_column(column, justify="right")
    named = [(name, p) for name, p in theirs.items()] + [(f"ours at {bits:g}", o.proof) for bits, o in ours.items()]
    records = []
    for name, p in sorted(named, key=lambda item: item[1].file_bytes):
        ratio = p.figures.mean_kl.value / hull_at(hull, p.file_bytes)
        records.append({"file": name, "ratio": ratio, **p.to_json()})
        bits = 8 * p.file_bytes / weights
        table.add_row(
            name,
            f"{p.file_bytes:,}",
            f"{bits:.3f}",
            f"{p.figures.mean_kl.value:.6f}",
            f"{p.figures.perplexity.value:.4f}",
            f"{ratio:.3f}",
        )
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
