"""SparseGPT against magnitude pruning on the embedded model, and what zeros cost on each format's grid.

    python -m benchmarks.pruning [--config configs/stdlib-6m.yaml] [--set KEY=VALUE] [--json FILE]

Every linear layer is pruned and quantized, the embedding stays in full precision; KL and perplexity are of held-out
test text. "magnitude": the smallest weights of each tensor (of each group), then plain rounding with importance
diag(H). "published": the column loop alone. "ours": with coordinate descent after it. The second table is of one
block's layers, pruned to 50 % by the loop alone, on the format's own grid with each pruned weight at the value nearest
to 0, and on the grid with an exact zero.
"""

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bitgenome.common.devices import best_device
from bitgenome.config.run import load_config
from bitgenome.plan.plan import Plan, make_plan
from bitgenome.plan.text import read_windows
from bitgenome.run.calibration import calibrate
from evaluators.engine.divergence import Divergence, Reference
from evaluators.model.block_model import BlockModel
from evaluators.model.forward import final_hidden
from evaluators.prepare.input_group import InputGroup, group_file
from quantizers.formats.grids import GRIDS, Grid, Scales
from quantizers.formats.packed_tensor import dequantize
from quantizers.formats.scalar_packing import pack
from quantizers.formats.table import FORMATS, QuantFormat
from quantizers.rounding.column_loop import Segment, column_loop
from quantizers.rounding.pruned_sparsegpt import encode_pruned, prune_and_compensate
from quantizers.rounding.pruning_masks import ColumnMasks, group_mask, unstructured_mask
from quantizers.rounding.row_batches import pad_rows
from quantizers.rounding.row_choice import row_errors
from quantizers.rounding.sparsegpt import compensate, conditional_importance
from quantizers.rounding.zero_grids import ZERO_GRIDS, pack_with_zero
from quantizers.settings import CompensationSettings, Sparsity
from quantizers.statistics.hessian import inverse_factor
from workers.pool.base import SerialPool

SPARSITIES = (Sparsity.of_fraction(0.5), Sparsity.of_pattern("2:4"))
CHOICES = {"Q4_K": FORMATS["Q4_K"], "Q4_0": FORMATS["Q4_0"], "alone (F16)": FORMATS["F16"]}
Encoder = Callable[[dict[str, Tensor], Tensor], dict[str, Tensor]]  # weights of a group, H -> what they decode to


@dataclass(frozen=True)
class Row:
    """One way to prune and quantize every linear layer."""

    sparsity: str
    format: str
    method: str
    kl: float
    perplexity: float
    zeros: float  # of the pruned layers' weights


@dataclass(frozen=True)
class ZeroCost:
    """One format, 50 % pruned: share of the pruned weights that decode to 0, and error over tr(W H W^T)."""

    format: str
    dense_error: float  # nothing pruned
    own_zeros: float
    own_error: float
    exact_zeros: float
    exact_error: float


def magnitude(fmt: QuantFormat, sparsity: Sparsity) -> Encoder:
    def encode(weights: dict[str, Tensor], H: Tensor) -> dict[str, Tensor]:
        decoded = {}
        for name, W in weights.items():
            scores = W.abs().T.contiguous()
            if sparsity.group:
                pruned = group_mask(scores, sparsity.zeros, sparsity.group)
            else:
                pruned = unstructured_mask(scores, sparsity.fraction)
            decoded[name] = dequantize(fmt, encode_pruned(fmt, W * ~pruned.T, H.diagonal()))
        return decoded

    return encode


def sparsegpt(fmt: QuantFormat, sparsity: Sparsity, rounds: int) -> Encoder:
    def encode(weights: dict[str, Tensor], H: Tensor) -> dict[str, Tensor]:
        formats, wanted = {name: [fmt] for name in weights}, dict.fromkeys(weights, sparsity)
        results = prune_and_compensate(weights, formats, wanted, H, CompensationSettings(refinement_rounds=rounds))
        return {name: result[fmt.name].packed.dequantize() for name, result in results.items()}

    return encode


def unpruned(fmt: QuantFormat) -> Encoder:
    def encode(weights: dict[str, Tensor], H: Tensor) -> dict[str, Tensor]:
        results = compensate(weights, {name: [fmt] for name in weights}, H)
        return {name: result[fmt.name].packed.dequantize() for name, result in results.items()}

    return encode


def methods() -> Iterator[tuple[str, str, str, Encoder]]:
    """Sparsity, format, method and encoder of every row."""
    for label, fmt in CHOICES.items():
        yield "none", label, "compensated", unpruned(fmt)
    for sparsity in SPARSITIES:
        for label, fmt in CHOICES.items():
            yield str(sparsity), label, "magnitude", magnitude(fmt, sparsity)
            yield str(sparsity), label, "published", sparsegpt(fmt, sparsity, 0)
            yield str(sparsity), label, "ours", sparsegpt(fmt, sparsity, CompensationSettings.refinement_rounds)


def measure(plan: Plan, groups: list[InputGroup], ids: Tensor, console: Console) -> tuple[Divergence, list[Row]]:
    """The full model's own figures, and a row for every method."""
    model = BlockModel(plan.folder, best_device())
    model.load_all()
    head = model.head
    full = final_hidden(model, ids)
    reference = Reference(full, head, ids)
    weights = {name: model.weight(name).data for group in groups for name in group.tensors}
    rows = []
    for sparsity, fmt, method, encode in methods():
        zeros = 0
        for group in groups:
            parts = {name: weights[name] for name in group.tensors}
            for name, decoded in encode(parts, group.hessian.to(model.device)).items():
                model.weight(name).data = decoded
                zeros += int((decoded == 0).sum())
        found = reference.compare(final_hidden(model, ids), head)
        rows.append(
            Row(sparsity, fmt, method, found.kl, found.perplexity, zeros / sum(W.numel() for W in weights.values()))
        )
        console.print(f"{sparsity}, {fmt}, {method}: KL {found.kl:.4f}")
    return reference.compare(full, head), rows


def loop_on(
    grid: Grid, W: Tensor, H: Tensor, encode: Callable[[Grid, Scales, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """W (rows, columns) pruned to 50 % and quantized by the column loop on ``grid``, decoded; and the mask."""
    U, _ = inverse_factor(H, 0.01)
    importance = conditional_importance(U, H)
    stack, segment = pad_rows(W.T), Segment(grid, slice(0, len(W)))
    masks = ColumnMasks(stack, importance, [(segment.rows, SPARSITIES[0])])
    integers = column_loop(stack, U.float(), importance, [segment], masks)
    data = encode(grid, Scales.concatenate(segment.scales, 0), integers[:, segment.rows].contiguous())
    return dequantize(grid.format, data), masks.kept[:, segment.rows].T


def zero_cost(name: str, weights: dict[str, Tensor], groups: list[InputGroup]) -> ZeroCost:
    """Sums over the layers of ``groups``."""
    power = dense = 0.0
    errors, zeros, pruned = [0.0, 0.0], [0, 0], [0, 0]
    for group in groups:
        H = group.hessian
        for tensor in group.tensors:
            W = weights[tensor]
            power += float(row_errors(W, H).sum())
            dense += compensate({tensor: W}, {tensor: [FORMATS[name]]}, H, CompensationSettings(refinement_rounds=0))[
                tensor
            ][name].error
            for place, (grid, encode) in enumerate(((GRIDS[name], pack), (ZERO_GRIDS[name], pack_with_zero))):
                decoded, kept = loop_on(grid, W, H, encode)
                errors[place] += float(row_errors(W - decoded, H).sum())
                zeros[place] += int((decoded[~kept] == 0).sum())
                pruned[place] += int((~kept).sum())
    own, exact = ((z / p, e / power) for z, p, e in zip(zeros, pruned, errors, strict=True))
    return ZeroCost(name, dense / power, *own, *exact)


def show(full: Divergence, rows: list[Row], costs: list[ZeroCost], tokens: int, console: Console) -> None:
    table = Table(title=f"{tokens:,} tokens of test text; full precision: perplexity {full.perplexity:.3f}")
    for column in ("sparsity", "format", "method", "zeros", "KL", "perplexity"):
        table.add_column(column, justify="left" if column in {"format", "method"} else "right")
    for r in rows:
        table.add_row(r.sparsity, r.format, r.method, f"{r.zeros:.3f}", f"{r.kl:.4f}", f"{r.perplexity:.3f}")
    console.print(table)
    table = Table(title="50 % by the loop alone, one block: zeros among the pruned weights, error over tr(W H W^T)")
    for column in ("format", "dense error", "own grid: zeros", "error", "grid with a zero: zeros", "error"):
        table.add_column(column, justify="right")
    for c in costs:
        figures = (c.dense_error, c.own_zeros, c.own_error, c.exact_zeros, c.exact_error)
        table.add_row(c.format, *(f"{figure:.4f}" for figure in figures))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/stdlib-6m.yaml"))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    console = Console(width=140)
    plan = make_plan(load_config(args.config, args.overrides))
    windows = read_windows(plan)
    directory, names = calibrate(plan, windows, SerialPool(), lambda items, total, what: iter(items))
    groups = [InputGroup.load(group_file(directory, name)) for name in names if ".layers." in name]
    ids = torch.from_numpy(windows.windows["test"])
    full, rows = measure(plan, groups, ids, console)
    middle = f".layers.{plan.folder.config['num_hidden_layers'] // 2}."
    block = [group for group in groups if middle in group.name]
    weights = {name: plan.folder.read(name).float() for group in block for name in group.tensors}
    costs = [zero_cost(name, weights, block) for name in sorted(ZERO_GRIDS)]
    show(full, rows, costs, ids.numel(), console)
    if args.json:
        record = {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
            "full": asdict(full),
            "rows": [asdict(row) for row in rows],
            "zeros": [asdict(cost) for cost in costs],
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
