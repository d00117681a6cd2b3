"""The bank on a GPU by its paths: kernels one by one, recorded, with Triton's panels and searches; and by processes.

Shapes are those of a block of Llama-3.1-8B, with random weights and a Hessian of correlated inputs. Each part has a
time limit, and what it raised is recorded; results are written after each part.

    python -m benchmarks.bank_paths --out DIR [--seconds 240] [--only PART ...] [--quick]
"""

import argparse
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
from torch import Tensor, multiprocessing
from torch.profiler import ProfilerActivity, profile

from benchmarks.limits import OutOfTimeError, time_limit
from bitgenome.common import devices, replay
from bitgenome.common.devices import best_device, device_name, release_memory
from quantizers.formats.table import FORMATS, K_LEVELS
from quantizers.rounding import panels, sparsegpt
from quantizers.rounding.sparsegpt import Compensated, compensate

MIB = 1 << 20
SIX = tuple(K_LEVELS.values())
OTHER = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_XS", "IQ4_NL")
PATHS = {"plain": (False, False), "recorded": (True, False), "panels": (False, True), "both": (True, True)}
# Input groups of a block of Llama-3.1-8B: columns, and the rows of the tensors that read them.
GROUPS = {
    "o": (4096, (4096,)),
    "qkv": (4096, (4096, 1024, 1024)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
BLOCKS, HEAD_ROWS = 32, 2 * 128256
Figures = dict[str, Any]


def choose(path: str) -> None:
    """Use the kernels of a path from now on, without recordings of an earlier one."""
    recorded, triton = PATHS[path]
    replay._RECORDINGS = replay.Recordings()
    replay._RECORDINGS.enabled = recorded
    panels.ENABLED = triton
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


def equality(
    columns: int, rows: Sequence[int], formats: Sequence[str], paths: Sequence[str], note: Callable[[Figures], None]
) -> None:
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
        note({path: figures | memory() | {"against": compared(found, expected), "active": replay._RECORDINGS.enabled}})


def block(path: str, names: Sequence[str], note: Callable[[Figures], None]) -> None:
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


def profiled(path: str, columns: int, rows: int, formats: Sequence[str], note: Callable[[Figures], None]) -> None:
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
    bank(weights, H, SIX)
    if path != "plain":
        bank(weights, H, SIX)
    barrier.wait(60)
    started = time.time()
    bank(weights, H, SIX)
    results.put((started, time.time()))


def processes(path: str, columns: int, rows: int, counts: Sequence[int], note: Callable[[Figures], None]) -> None:
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


def compiled(columns: int, rows: int, formats: Sequence[str], note: Callable[[Figures], None]) -> None:
    """Whether torch.compile makes the scale search as fast without code of ours."""
    from quantizers.formats.grids import GRIDS
    from quantizers.rounding.scale_search import fit

    choose("plain")
    weights, H = subject(columns, (rows,))
    x, w = weights["t0"].T.contiguous(), H.diagonal()[:, None].contiguous()
    for name in formats:
        grid = GRIDS[name]
        blocks = grid.blocks(x), grid.blocks(w)
        found: Figures = {}
        for kind, function in (
            ("eager", partial(fit, grid)),
            ("compiled", torch.compile(partial(fit, grid), dynamic=False)),
        ):
            for turn in ("first", "second", "third"):
                synchronize()
                started = time.perf_counter()
                scales = function(*blocks)
                synchronize()
                found[f"{kind} {turn}"] = time.perf_counter() - started
            found[f"{kind} d"] = float(scales.d.double().abs().sum())
            note({name: dict(found)})


class Report:
    """Runs parts within their limits, and writes what they found after each note."""

    def __init__(self, folder: Path, deadline: float):
        self.folder, self.deadline = folder, deadline
        self.parts: Figures = {"machine": machine()}
        folder.mkdir(parents=True, exist_ok=True)

    def part(self, name: str, limit: float, run: Callable[[Callable[[Figures], None]], None]) -> None:
        found = self.parts.setdefault(name, {})
        limit = min(limit, self.deadline - time.perf_counter())
        if limit < 5:
            found["error"] = "no time left"
            return
        started = time.perf_counter()

        def note(figures: Figures) -> None:
            found.update(figures)
            print(name, json.dumps(figures, default=str)[:600], flush=True)
            self.write()

        with recorded(found), time_limit(limit):
            run(note)
        found["part seconds"] = time.perf_counter() - started
        print(name, f"{found['part seconds']:.1f} s", found.get("error", ""), flush=True)
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
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError as error:
        found["triton"] = str(error)
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
    small, side = (512, (64, 32)), 512 if args.quick else 2048
    rows = 64 if args.quick else 4096
    if args.quick:
        GROUPS.update({name: (512, (64,)) for name in GROUPS})
    parts: dict[str, tuple[float, Callable[[Callable[[Figures], None]], None]]] = {
        "all types": (45, partial(equality, 1024 if not args.quick else 512, small[1], (*SIX, *OTHER), tuple(PATHS))),
        "o at six levels": (60, partial(equality, GROUPS["o"][0], GROUPS["o"][1], SIX, ("plain", "recorded", "both"))),
        "block, both": (90, partial(block, "both", tuple(GROUPS))),
        "kernels": (30, partial(profiled, "both", side, rows, SIX)),
        "processes, plain": (60, partial(processes, "plain", side, rows, (1, 2, 4))),
        "processes, both": (60, partial(processes, "both", side, rows, (1, 2, 4))),
        "block, recorded": (60, partial(block, "recorded", ("o", "down"))),
        "compiled": (60, partial(compiled, side, rows, ("Q4_K", "Q6_K"))),
    }
    for name, (limit, run) in parts.items():
        if not args.only or name in args.only:
            report.part(name, limit, run)
    print(json.dumps(report.parts, default=str)[:12000])


if __name__ == "__main__":
    main()
