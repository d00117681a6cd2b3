"""The search against llama.cpp's own mixes, at the mixes' own sizes, by llama.cpp's own numbers.

For each mix: its types by llama.cpp's rules, encoded by ggml with importance from the same calibration text; then
a search whose budget is exactly that file's size. Both files run in llama.cpp on the same held-out text.

    python -m benchmarks.llamacpp_mixes [--config configs/stdlib-6m.yaml] [--mix Q2_K --mix Q3_K_M] [--json out.json]
"""

import argparse
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from bitgenome.common import layout
from bitgenome.config.run import RunConfig, load_config
from bitgenome.plan.plan import make_plan
from bitgenome.run.pipeline import run
from bitgenome.run.proof import Proof, prove
from evaluators.data.windows import TokenWindows
from evaluators.model.folder import ModelFolder
from exporters.files.imatrix import read_imatrix
from exporters.opening.source import read_model
from exporters.runtime.mix_file import MixFile
from exporters.runtime.original import write_original

CELLS: tuple[Callable[[Proof], str], ...] = (
    lambda p: f"{p.file_bytes:,}",
    lambda p: f"{p.figures.mean_kl.value:.5f}",
    lambda p: f"{p.figures.perplexity.value:.3f}",
)


@dataclass(frozen=True)
class Duel:
    mix: str
    theirs: Proof
    ours: Proof
    evaluations: int

    @property
    def ratio(self) -> float:
        """KL of our file over that of the mix, both by llama.cpp."""
        return self.ours.figures.mean_kl.value / self.theirs.figures.mean_kl.value


def export_mix(folder: ModelFolder, mix: str, imatrix: Path, path: Path) -> int:
    """Write the file that llama-quantize would make of ``mix`` with an importance matrix; its bytes."""
    with TemporaryDirectory(dir=path.parent) as scratch:
        original = Path(scratch) / "original.gguf"
        write_original(folder, original)
        return MixFile(read_model(original), mix).write(path, read_imatrix(imatrix))


def duel(config: RunConfig, mix: str, console: Console) -> Duel:
    folder = make_plan(config).folder
    path = config.storage_path / f"{folder.path.name}-llamacpp-{mix}.gguf"
    size = export_mix(folder, mix, config.storage_path / config.name / layout.IMATRIX, path)
    ours = config.model_copy(
        update={
            "name": f"{folder.path.name}-against-{mix}",
            "budget": config.budget.model_copy(update={"bits_per_weight": None, "file_size": size}),
        }
    )
    outcome = run(ours, console)
    text = TokenWindows.load(outcome.run / layout.WINDOWS)
    assert outcome.proof is not None
    return Duel(mix, prove(path, folder, text), outcome.proof, outcome.evaluations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/stdlib-6m.yaml"))
    parser.add_argument("--mix", action="append")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    console = Console()
    config = load_config(args.config, args.overrides)
    run(config, console)
    duels = [duel(config, mix, console) for mix in args.mix or ("Q2_K", "Q3_K_M")]
    table = Table(title="llama.cpp's mixes and the search at their size, both run by llama.cpp", title_justify="left")
    for column in ("mix", "bytes", "KL", "ppl", "our bytes", "our KL", "our ppl", "KL ratio"):
        table.add_column(column, justify="right")
    for d in duels:
        cells = [f(file) for file in (d.theirs, d.ours) for f in CELLS]
        table.add_row(d.mix, *cells, f"{d.ratio:.3f}")
    console.print(table)
    if args.json:
        records = [
            {"mix": d.mix, "ratio": d.ratio, "theirs": d.theirs.to_json(), "ours": d.ours.to_json()} for d in duels
        ]
        args.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
