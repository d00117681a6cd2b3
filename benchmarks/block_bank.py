"""The bank of one block at the shapes of a 7B model: seconds, memory, and the published GPTQ procedure at one level.

Random weights and a random Hessian of full rank, input group by input group (q/k/v, o, gate/up, down). The cost of
rows is proportional to their number, that of the Hessian's factor is not: ``--rows`` of each tensor are measured, the
rest is arithmetic (the table says so). GPTQ (Frantar et al. 2022, algorithm 1): float32, Cholesky factor of the
inverse, blocks of 128 columns, 4 bits in groups of 128 columns, one level.

    python -m benchmarks.block_bank [--hidden 3584] [--ffn 18944] [--kv 512] [--rows 1024] [--levels fine]
        [--json out.json]
"""

import argparse
import json
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bitgenome.common.devices import best_device
from quantizers.formats.table import FORMATS, LEVEL_FORMATS, LEVEL_PRESETS, QuantFormat
from quantizers.rounding.sparsegpt import compensate
from quantizers.statistics.hessian import inverse_factor

GPTQ_BLOCK = 128
MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    """Seconds of one input group, all its rows; those of the factor are part of both totals."""

    group: str
    rows: int
    columns: int
    factor: float
    bank: float
    gptq_factor: float
    gptq: float
    peak_mib: float  # of this process so far
    needed_mib: float  # float32 weights and Hessian, and the packed levels of the rows measured


def gptq_factor(H: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped inverse, as published: three factorizations in float32."""
    H = H.clone()
    H.diagonal().add_(0.01 * H.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)


def gptq(W: Tensor, U: Tensor) -> None:
    """Round W (rows, columns) in place to 4 bits in groups of 128 columns."""
    for start in range(0, W.shape[1], GPTQ_BLOCK):
        stop = min(start + GPTQ_BLOCK, W.shape[1])
        block = W[:, start:stop].clone()
        errors = torch.empty_like(block)
        low, high = block.amin(1).clamp(max=0), block.amax(1).clamp(min=0)
        scale = ((high - low) / 15).clamp(min=1e-10)
        zero = (-low / scale).round()
        for j in range(stop - start):
            w = block[:, j]
            q = scale * ((w / scale + zero).round().clamp(0, 15) - zero)
            error = (w - q) / U[start + j, start + j]
            block[:, j:] -= error[:, None] * U[start + j, start + j : stop][None]
            errors[:, j] = error
            W[:, start + j] = q
        W[:, stop:] -= errors @ U[start:stop, stop:]


def clock(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def measure(name: str, total: int, columns: int, rows: int, formats: list[QuantFormat], device: torch.device) -> Row:
    """One input group of ``total`` rows, of which ``rows`` at most are computed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(columns // 2, columns, generator=generator).to(device)
    H = x.T @ x / len(x)
    H.diagonal().add_(0.1)
    W = 0.02 * torch.randn(min(rows, total), columns, generator=generator).to(device)
    started = clock(device)
    inverse_factor(H, 0.01)
    factor = clock(device) - started
    compensate({"w": W}, {"w": formats}, H)
    bank = clock(device) - started - factor
    packed = sum(fmt.tensor_bytes(W.shape) for fmt in formats)
    started = clock(device)
    U = gptq_factor(H)
    theirs_factor = clock(device) - started
    gptq(W.clone(), U)
    theirs = clock(device) - started - theirs_factor
    scale = total / len(W)
    return Row(
        name, total, columns, factor, factor + (bank - factor) * scale, theirs_factor,
        theirs_factor + theirs * scale, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        (4 * W.numel() + 4 * H.numel() + packed) / MIB,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=3584)
    parser.add_argument("--ffn", type=int, default=18944)
    parser.add_argument("--kv", type=int, default=512)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--levels", choices=sorted(LEVEL_PRESETS), default="fine")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = best_device()
    formats = [FORMATS[LEVEL_FORMATS[level]] for level in LEVEL_PRESETS[args.levels]]
    groups = {
        "q, k, v": (args.hidden + 2 * args.kv, args.hidden),
        "o": (args.hidden, args.hidden),
        "gate, up": (2 * args.ffn, args.hidden),
        "down": (args.hidden, args.ffn),
    }
    table = Table(title=f"one block, {len(formats)} formats, {args.rows} rows measured, {device}", title_justify="left")
    for column in ("input of", "rows", "columns", "factor s", "bank s", "GPTQ factor s", "GPTQ s", "ratio", "MiB"):
        table.add_column(column, justify="right")
    found = []
    for name, (total, columns) in groups.items():
        row = measure(name, total, columns, args.rows, formats, device)
        found.append(row)
        table.add_row(
            name, str(total), str(columns), f"{row.factor:.1f}", f"{row.bank:.1f}", f"{row.gptq_factor:.1f}",
            f"{row.gptq:.1f}", f"{row.bank / row.gptq:.2f}", f"{row.peak_mib:.0f} of {row.needed_mib:.0f}",
        )  # fmt: skip
    ours, theirs = sum(r.bank for r in found), sum(r.gptq for r in found)
    table.add_row("block", "", "", "", f"{ours:.1f}", "", f"{theirs:.1f}", f"{ours / theirs:.2f}", "")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
