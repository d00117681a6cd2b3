"""The bank on a GPU by its paths: kernels one by one, recorded, with Triton's panels and searches; and by processes.

Shapes are those of a block of Llama-3.1-8B, with random weights and a Hessian of correlated inputs. Each part has a
time limit, and what it raised is recorded; results are written after each part.

    python -m benchmarks.bank_paths --out DIR [--seconds 240] [--only PART ...] [--quick]
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, multiprocessing
from torch.profiler import ProfilerActivity, profile

from benchmarks.limits import OutOfTimeError, time_limit
from bitgenome.common import replay
from bitgenome.common.devices import best_device, device_name, release_memory
from quantizers.formats.grids import GRIDS, round_to_grid, safe_inverse
from quantizers.formats.table import FORMATS, K_LEVELS
from quantizers.kernels import choice as kernels
from quantizers.rounding.row_choice import Compensated
from quantizers.rounding.scale_search import fit
from quantizers.rounding.sparsegpt import compensate

MIB = 1 << 20
CONSOLE = Console(highlight=False, markup=False)
SIX = tuple(K_LEVELS.values())
OTHER = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_XS", "IQ4_NL")
PATHS: dict[str, set[str]] = {
    "plain": set(), "recorded": {"recorded"}, "panels": {"panels"}, "searches": {"searches"},
    "recorded panels": {"recorded", "panels"}, "searched": {"recorded", "panels", "searches"},
    "all": {"recorded", "panels", "searches", "codes", "blocks"},
}  # fmt: skip
# Input groups of a block of Llama-3.1-8B: columns, and the rows of the tensors that read them.
GROUPS = {
    "o": (4096, (4096,)),
    "qkv": (4096, (4096, 1024, 1024)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
BLOCKS, HEAD_ROWS = 32, 2 * 128256
Figures = dict[str, Any]
Note = Callable[[Figures], None]


def choose(path: str) -> None:
    """Use the kernels of a path from now on, without recordings of an earlier one."""
    replay._RECORDINGS = replay.Recordings()
    replay._RECORDINGS.enabled = "recorded" in PATHS[path]
    kernels.ENABLED = PATHS[path] - {"recorded"}
    release_memory()


def subject(columns: int, rows: Sequence[int], seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Heavy-tailed weights by name, and a Hessian of correlated inputs (columns, columns)."""
    device = best_device()
    generator = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device=device)
    weights = {}
    for i, n in enumerate(rows):
        chi = normal(4, n, columns).square_().mean(0).sqrt_()
        weights[f"t{i}"] = 0.03 * normal(n, columns) / chi * normal(n, 1).mul_(0.3).exp_()
        del chi
    x = normal(2 * columns, columns // 4) @ normal(columns // 4, columns) / columns**0.5 + 0.3 * normal(
        2 * columns, columns
    )
    x *= normal(columns).mul_(0.6).exp_()
    return weights, x.T @ x / len(x)


def bank(
    weights: Mapping[str, Tensor], H: Tensor, formats: Sequence[str]
) -> tuple[dict[str, dict[str, Compensated]], float]:
    """The bank of a group, and the seconds that it took."""
    synchronize()
    started = time.perf_counter()
    found = compensate(weights, {name: [FORMATS[f] for f in formats] for name in weights}, H)
    synchronize()
    return found, time.perf_counter() - started


def synchronize() -> None:
    if best_device().type != "cpu":
        torch.accelerator.synchronize()


def compared(a: Mapping[str, Mapping[str, Compensated]], b: Mapping[str, Mapping[str, Compensated]]) -> Figures:
    """Share of equal bytes and the relative difference of the objective, by format."""
    found: Figures = {}
    for tensor, levels in a.items():
        for name, mine in levels.items():
            other = b[tensor][name]
            equal = float((mine.packed.data == other.packed.data).float().mean())
            found[name] = {"equal": equal, "objective": mine.error / other.error - 1 if other.error else 0.0}
    return found


def memory() -> Figures:
    if best_device().type == "cpu":
        return {}
    return {
        "allocated_mib": round(torch.accelerator.memory.max_memory_allocated() / MIB),
        "reserved_mib": round(torch.accelerator.memory.max_memory_reserved() / MIB),
    }


def equality(columns: int, rows: Sequence[int], formats: Sequence[str], paths: Sequence[str], note: Note) -> None:
    """Each path twice on one group: seconds of the first and second time, and its bytes against the plain path's."""
    weights, H = subject(columns, rows)
    expected = None
    for path in paths:
        choose(path)
        if best_device().type != "cpu":
            torch.accelerator.memory.reset_peak_memory_stats()
        found, first = bank(weights, H, formats)
        figures: Figures = {"first": first}
        if path != "plain":
            found, figures["second"] = bank(weights, H, formats)
        expected = expected or found
        note({path: figures | memory() | {"used": used(), "against": compared(found, expected)}})


def used() -> list[str]:
    """What is used where it is wanted."""
    like = torch.empty(0, device=best_device())
    recorded = ["recorded"] if replay._RECORDINGS.active(like.device) else []
    return recorded + [kind for kind in kernels.TRIALS if kernels.kernels_for(kind, like)]


def block(path: str, names: Sequence[str], note: Note) -> None:
    """Seconds of each group of a block at six levels: first, then recorded; and of a slice of head and embedding."""
    choose(path)
    seconds = {}
    for name in names:
        weights, H = subject(*GROUPS[name])
        _, first = bank(weights, H, SIX)
        _, seconds[name] = bank(weights, H, SIX)
        note({name: {"first": first, "second": seconds[name]} | memory()})
    if set(names) >= set(GROUPS):
        rows = sum(GROUPS["gate_up"][1])
        whole = BLOCKS * sum(seconds.values()) + HEAD_ROWS / rows * seconds["gate_up"]
        note({"block": sum(seconds.values()), "whole 8B, minutes": whole / 60})


def profiled(path: str, columns: int, rows: int, formats: Sequence[str], note: Note) -> None:
    """Kernels of one group by total time, when everything is recorded already."""
    choose(path)
    weights, H = subject(columns, (rows,))
    for _ in range(2):
        _, seconds = bank(weights, H, formats)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        bank(weights, H, formats)
    busy: dict[str, list[float]] = {}
    for event in seen.profiler.kineto_results.events():
        record = busy.setdefault(event.name()[:110], [0, 0.0])
        record[0] += 1
        record[1] += event.duration_ns() / 1e9
    top = sorted(busy.items(), key=lambda item: -item[1][1])
    total = [sum(r[i] for r in busy.values()) for i in (0, 1)]
    note({"seconds": seconds, "kernels": total[0], "busy": total[1], "top": top[:40]})


def share_of_work(path: str, columns: int, rows: int, barrier: Any, results: Any) -> None:
    """What one of several processes does: a group at six levels twice, the second time when all are ready."""
    choose(path)
    weights, H = subject(columns, (rows,))
    for _ in range(1 if path == "plain" else 2):
        bank(weights, H, SIX)
    barrier.wait(60)
    started = time.time()
    bank(weights, H, SIX)
    results.put((started, time.time()))


def processes(path: str, columns: int, rows: int, counts: Sequence[int], note: Note) -> None:
    """Seconds for one group each by 1, 2 and 4 processes at the same time."""
    context = multiprocessing.get_context("spawn")
    for count in counts:
        barrier, results = context.Barrier(count), context.Queue()
        arguments = (path, columns, rows, barrier, results)
        workers = [context.Process(target=share_of_work, args=arguments, daemon=True) for _ in range(count)]
        for worker in workers:
            worker.start()
        try:
            times = [results.get(timeout=60) for _ in workers]
        finally:
            for worker in workers:
                worker.join(5)
                worker.kill()
        span = max(end for _, end in times) - min(start for start, _ in times)
        note({f"{count}": {"seconds": span, "seconds a group": span / count}})


def fits(columns: int, rows: int, formats: Sequence[str], note: Note) -> None:
    """The error of scales that Triton's search finds against torch's, in all and by row, with its standard error."""
    weights, H = subject(columns, (rows,))
    x, w = weights["t0"].T.contiguous(), (H.diagonal() / H.diagonal().mean())[:, None].contiguous()
    for name in formats:
        grid = GRIDS[name]
        given = grid.blocks(x), grid.blocks(w)
        errors, seconds = [], []
        for path in ("plain", "searches"):
            choose(path)
            fit(grid, *given)
            synchronize()
            started = time.perf_counter()
            scales = fit(grid, *given)
            synchronize()
            seconds.append(time.perf_counter() - started)
            choose("plain")
            step, offset = scales.step, scales.offset
            decoded = round_to_grid(grid, given[0], offset, safe_inverse(step)) * step - offset
            errors.append(((decoded - given[0]).double().square() * given[1]).sum((0, 1, 2)))
        ratio = errors[1] / errors[0] - 1
        error = float(ratio.std() / len(ratio) ** 0.5)
        found = {
            "all": float(errors[1].sum() / errors[0].sum() - 1),
            "mean of rows": float(ratio.mean()),
            "error": error,
        }
        note({name: found | {"seconds": seconds}})


class Report:
    """Runs parts within their limits, and writes what they found after each note."""

    def __init__(self, folder: Path, deadline: float):
        self.folder, self.deadline = folder, deadline
        self.parts: Figures = {"machine": machine()}
        folder.mkdir(parents=True, exist_ok=True)

    def part(self, name: str, limit: float, run: Callable[[Note], None]) -> None:
        found = self.parts.setdefault(name, {})
        limit = min(limit, self.deadline - time.perf_counter())
        if limit < 5:
            found["error"] = "no time left"
            return
        started = time.perf_counter()

        def note(figures: Figures) -> None:
            found.update(figures)
            CONSOLE.print(name, json.dumps(figures, default=str)[:600], soft_wrap=True)
            self.write()

        with recorded(found), time_limit(limit):
            run(note)
        found["part seconds"] = time.perf_counter() - started
        CONSOLE.print(name, f"{found['part seconds']:.1f} s", found.get("error", ""), soft_wrap=True)
        self.write()
        release_memory()

    def write(self) -> None:
        (self.folder / "bank_paths.json").write_text(json.dumps(self.parts, indent=1, default=str) + "\n")


@contextmanager
def recorded(found: Figures) -> Iterator[None]:
    """Record what is raised inside instead of raising it."""
    try:
        yield
    except OutOfTimeError:
        found["error"] = "cut: out of time"
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"[:2000]
        found["traceback"] = traceback.format_exc()[-4000:]


def machine() -> Figures:
    found = {"device": device_name(best_device()), "torch": torch.__version__, "python": platform.python_version()}
    spec = importlib.util.find_spec("triton")
    found["triton"] = importlib.metadata.version("triton") if spec else "none"
    found["compiler"] = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang") or "none"
    found["cpus"] = os.cpu_count()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--only", nargs="+", help="these parts alone")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script")
    args = parser.parse_args()
    report = Report(args.out, time.perf_counter() + args.seconds)
    mixed, side, rows = (1024, (512, 96)), 1024, 4096
    if args.quick:
        mixed, side, rows = (512, (64, 32)), 512, 64
        GROUPS.update(dict.fromkeys(GROUPS, (512, (64,))))
    parts: dict[str, tuple[float, Callable[[Note], None]]] = {
        "fits": (20, partial(fits, side, rows, (*SIX, *OTHER))),
        "all types": (60, partial(equality, *mixed, (*SIX, *OTHER), tuple(PATHS))),
        "o at six levels": (60, partial(equality, *GROUPS["o"], SIX, ("plain", "recorded", "recorded panels", "all"))),
        "codebooks": (50, partial(equality, side, (rows,), ("IQ2_XXS", "IQ3_S"), ("plain", "recorded"))),
        "block, all": (80, partial(block, "all", tuple(GROUPS))),
        "block, recorded": (60, partial(block, "recorded", tuple(GROUPS))),
        "kernels": (30, partial(profiled, "all", side, rows, SIX)),
        "processes, plain": (50, partial(processes, "plain", side, rows, (1, 4))),
        "processes, all": (50, partial(processes, "all", side, rows, (1, 4))),
    }
    for name, (limit, run) in parts.items():
        if not args.only or name in args.only:
            report.part(name, limit, run)
    CONSOLE.print(json.dumps(report.parts, default=str)[:11000], soft_wrap=True)


if __name__ == "__main__":
    main()
