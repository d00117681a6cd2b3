"""Which model types run: each made small, converted, run in llama.cpp, and held against transformers.

    OMP_NUM_THREADS=1 python -m benchmarks.models --converter FOLDER [--only llama qwen3 ...] [--missing] [--quantize]

FOLDER holds llama.cpp's ``convert_hf_to_gguf.py`` with its packages. Every row is measured in a process of its own, so
that what aborts is a row too, and is kept as a file of ``benchmarks/models/results``; docs/models.md is made of all
that are there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.models.case import cases
from benchmarks.models.table import RESULTS, rows, show, write_page

REPOSITORY = Path(__file__).parents[2]
LIMIT_S = 300.0  # of one row


def measure(name: str, work: Path, converter: Path, limit: float, quantized: bool) -> None:
    """Measure one row in a process of its own, whose end becomes the result where it could not say itself."""
    result, folder = RESULTS / f"{name}.json", work / name
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.models.row", name, str(folder), str(result), str(converter)]
    command += ["quantize"] * quantized
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TRANSFORMERS_VERBOSITY": "error"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, check=False)
        ended = f"its process ended with {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1][:200]}"
    except subprocess.TimeoutExpired:
        ended = f"no end within {limit:g} s"
    row = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {"name": name, "stage": "start"}
    if row["stage"] != "done" and "failed" not in row:
        result.write_text(json.dumps(row | {"failed": ended}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measure the rows asked for, print all, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--converter", type=Path, help="folder of convert_hf_to_gguf.py and its packages")
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="types or rows, by default all")
    parser.add_argument("--missing", action="store_true", help="only rows that are not measured yet, or failed")
    parser.add_argument("--quantize", action="store_true", help="also search, export and prove each in a whole run")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--work", type=Path, help="folder to keep the models in, by default a temporary one")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds of one row")
    options = parser.parse_args()
    console = Console()
    if not options.table:
        if options.converter is None or not (options.converter / "convert_hf_to_gguf.py").is_file():
            parser.error("expected --converter, a folder with convert_hf_to_gguf.py")
        RESULTS.mkdir(exist_ok=True)
        whole = {row["name"] for row in rows() if "failed" not in row}
        with tempfile.TemporaryDirectory() as scratch:
            for case in cases().values():
                if options.only and case.type not in options.only and case.name not in options.only:
                    continue
                if not (options.missing and case.name in whole):
                    measure(
                        case.name,
                        options.work or Path(scratch),
                        options.converter.absolute(),
                        options.limit,
                        options.quantize,
                    )
                    show(console, [row for row in rows() if row["name"] == case.name])
    write_page()
    show(console, rows())


if __name__ == "__main__":
    main()
