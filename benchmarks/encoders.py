"""Speed and error of the block formats' encoders, decoders and compensation, against ggml's C code, on one thread.

    python -m benchmarks.encoders [--rows 768] [--columns 256] [--seconds 1.0] [--json FILE]

Weights are seeded and heavy-tailed, importance log-normal. "error" is our importance-weighted squared error over
ggml's with the same importance.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from quantizers.formats.packed_tensor import dequantize
from quantizers.formats.table import FORMATS, LEVEL_FORMATS, QuantFormat
from quantizers.rounding.nearest import quantize
from quantizers.rounding.sparsegpt import compensate
from tests import ggml_reference
from tests.quantizers.weights import correlated_hessian, heavy_tailed, skewed_importance


@dataclass(frozen=True)
class Row:
    """Million weights per second, and the error ratio, of one format."""

    format: str
    encode: float
    decode: float
    ggml_encode: float
    ggml_decode: float
    error: float


def rate(weights: int, seconds: float, function: Callable[[], object]) -> float:
    """Million weights per second of the fastest run within ``seconds``, at least three runs."""
    best, begin, runs = float("inf"), time.perf_counter(), 0
    while runs < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
        runs += 1
    return weights / best / 1e6


def weighted_error(W: Tensor, decoded: Tensor, importance: Tensor) -> float:
    return float((importance.double() * (W - decoded).double().square()).sum())


def measure(fmt: QuantFormat, W: Tensor, importance: Tensor, seconds: float) -> Row:
    data, reference = quantize(fmt, W, importance), ggml_reference.quantize(fmt, W, importance)
    ours, theirs = dequantize(fmt, data), ggml_reference.dequantize(fmt, reference)
    return Row(
        fmt.name,
        rate(W.numel(), seconds, lambda: quantize(fmt, W, importance)),
        rate(W.numel(), seconds, lambda: dequantize(fmt, data)),
        rate(W.numel(), seconds, lambda: ggml_reference.quantize(fmt, W, importance)),
        rate(W.numel(), seconds, lambda: ggml_reference.dequantize(fmt, data)),
        weighted_error(W, ours, importance) / weighted_error(W, theirs, importance),
    )


def measure_compensation(W: Tensor, seconds: float) -> float:
    """Million weights per second, all six levels at once; a weight at six levels counts as six."""
    formats = [FORMATS[name] for level, name in LEVEL_FORMATS.items() if level != "W16"]
    H = correlated_hessian(W.shape[1])
    return rate(W.numel() * len(formats), seconds, lambda: compensate({"w": W}, {"w": formats}, H))


def table(rows: list[Row], compensation: float) -> str:
    lines = [f"{'':6}{'encode':>9}{'ggml':>9}{'decode':>9}{'ggml':>9}{'error':>8}   (million weights/s; ratio)"]
    lines += [
        f"{r.format:6}{r.encode:9.2f}{r.ggml_encode:9.2f}{r.decode:9.0f}{r.ggml_decode:9.0f}{r.error:8.4f}"
        for r in rows
    ]
    return "\n".join([*lines, f"compensation, six levels at once: {compensation:.2f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--columns", type=int, default=256, help="a multiple of 256")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each measurement")
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    W, importance = heavy_tailed(arguments.rows, arguments.columns), skewed_importance(arguments.columns)
    block_formats = [f for f in FORMATS.values() if not f.is_float]
    rows = [measure(fmt, W, importance, arguments.seconds) for fmt in block_formats]
    compensation = measure_compensation(W, arguments.seconds)
    sys.stdout.write(table(rows, compensation) + "\n")
    if arguments.json:
        record = {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, torch {torch.__version__}, one thread",
            "shape": list(W.shape),
            "rows": [asdict(row) for row in rows],
            "compensation": compensation,
        }
        arguments.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
