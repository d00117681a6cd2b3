"""What each step of the encoder is worth, format by format: reconstruction error and held-out KL.

Every quantizable tensor takes the same format:

    (a) plain rounding           our encoder, all columns alike
    (b) ggml with importance     ggml's C encoder, importance diag(H): what an importance matrix gives llama.cpp
    (c) ours                     compensation (SparseGPT) onto the format's grid
    (d) ours + scaling           channels scaled as AWQ does, alpha searched, then as (c)
    (e) ours + refinement        compensation, then coordinate descent of scales and integers
    (f) ours by loss             as (e), on both sides: rows aim at what makes up for the rows before them
    (g) ours + healing           as (f), then norms and biases tuned by distillation

    python -m benchmarks.formats [--config configs/core/levels-all.yaml] [--set KEY=VALUE] [--json out.json]
"""

import argparse
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bitgenome.common.devices import best_device
from bitgenome.config.quantization import QuantizationConfig
from bitgenome.config.run import RunConfig, load_config
from bitgenome.observe.progress import track
from bitgenome.plan.plan import Plan, make_plan
from bitgenome.plan.text import read_windows
from bitgenome.run.bank import build_bank
from bitgenome.run.calibration import calibrate, measure_outputs
from bitgenome.run.healing import heal
from bitgenome.run.prepare import evaluator_setup, record_inputs, scale_channels
from bitgenome.storage.run_directory import RunDirectory
from evaluators.data.windows import TokenWindows
from evaluators.engine.divergence import Reference
from evaluators.engine.evaluator import EvaluateGenomes
from evaluators.model.block_model import BlockModel
from evaluators.model.forward import final_hidden
from evaluators.prepare.input_group import InputGroup, group_file
from quantizers.formats.packed_tensor import dequantize
from quantizers.formats.table import FORMATS, QuantFormat
from quantizers.rounding.nearest import quantize
from quantizers.rounding.row_choice import row_errors
from search.types import Evaluation, Fidelity, Genome
from tests import ggml_reference
from workers.cluster.open_pool import open_pool
from workers.pool.base import Pool

Encode = Callable[[QuantFormat, Tensor, Tensor], Tensor]  # format, W, importance -> bytes
ENCODERS: dict[str, Encode] = {
    "plain": lambda fmt, W, importance: quantize(fmt, W),
    "ggml": ggml_reference.quantize,
}
STEPS = ("plain", "ggml", "ours", "scaling", "refinement", "loss", "healing")
Figures = dict[str, tuple[float, float]]  # step -> reconstruction error over power, KL


def uniform(plan: Plan, fmt: str) -> Genome:
    """The genome whose every gene takes ``fmt``, or its largest type where rows do not divide into ``fmt``'s blocks."""
    names = [[f.name for f in gene.formats] for gene in plan.space.genes]
    return tuple(choices.index(fmt) if fmt in choices else len(choices) - 1 for choices in names)


def block_formats(plan: Plan) -> list[str]:
    """Every format that some tensor can take, but floats, smallest first."""
    found = {f for gene in plan.space.genes for f in gene.formats if not f.is_float}
    return [f.name for f in sorted(found, key=lambda f: (f.bits_per_weight, f.name))]


def with_quantization(plan: Plan, **changes: Any) -> Plan:
    settings = QuantizationConfig.model_validate(plan.config.quantization.model_dump() | changes)
    return replace(plan, config=plan.config.model_copy(update={"quantization": settings}))


class Bench:
    """The artefacts that all formats share."""

    def __init__(self, config: RunConfig, pool: Pool, console: Console):
        self.plan, self.pool, self.console = make_plan(config), pool, console
        self.windows: TokenWindows = read_windows(self.plan)
        self.run = RunDirectory.create(config)
        record_inputs(self.plan, self.windows, self.run)
        self.test = Fidelity("test", config.text.tokens.test)
        self.calibration, self.groups = calibrate(self.plan, self.windows, pool, self.track)
        output = with_quantization(self.plan, objective="output")
        self.setups = {
            "ours": self.bank(with_quantization(output, refinement_rounds=0)),
            "scaling": self.scaled_bank(with_quantization(output, refinement_rounds=0, scaling={"kind": "awq"})),
            "refinement": self.bank(output),
            "loss": self.bank(with_quantization(self.plan, objective="loss"), self.outputs()),
        }

    def track(self, items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
        return track(items, total, what, self.console)

    def outputs(self) -> Path:
        return measure_outputs(self.plan, self.windows, self.pool, self.track)

    def bank(self, plan: Plan, outputs: Path | None = None) -> Any:
        artefacts = self.calibration, self.groups, self.pool, self.track
        return evaluator_setup(plan, self.run, build_bank(plan, *artefacts, outputs=outputs))

    def scaled_bank(self, plan: Plan) -> Any:
        plan, calibration = scale_channels(plan, self.calibration, self.groups, self.run, self.pool, self.track)
        return evaluator_setup(plan, self.run, build_bank(plan, calibration, self.groups, self.pool, self.track))

    def banked(self, step: str, formats: list[str], fidelity: Fidelity) -> list[Evaluation]:
        """Uniform genomes of every format, from the bank of a step."""
        setup = self.setups[step]
        tasks = [EvaluateGenomes(setup, (uniform(self.plan, fmt),), fidelity, f"{step}[{fmt}]") for fmt in formats]
        return [found for (found,) in self.track(self.pool.map(tasks), len(tasks), f"measuring {step}")]

    @torch.inference_mode()
    def encoded(self, fmt: str, encode: Encode) -> tuple[float, float]:
        """Reconstruction and KL of the model encoded without compensation."""
        model = BlockModel(self.plan.folder, best_device())
        model.load_all()
        ids = torch.from_numpy(self.windows.take(self.test.split, self.test.tokens))
        full = final_hidden(model, ids)
        reference = Reference(full, model.head, ids, self.windows.unscored)
        error = power = 0.0
        for group in (InputGroup.load(group_file(self.calibration, name)) for name in self.groups):
            for name in group.tensors:
                W = model.weight(name).data
                if not FORMATS[fmt].fits(W.shape[1]):
                    continue
                decoded = dequantize(FORMATS[fmt], encode(FORMATS[fmt], W, group.hessian.diagonal().contiguous()))
                error += float(row_errors(W - decoded, group.hessian).sum())
                power += float(row_errors(W, group.hessian).sum())
                model.weight(name).data = decoded
        return error / power, reference.compare(final_hidden(model, ids), model.head).kl

    def healed(self, evaluation: Evaluation) -> float:
        shape = self.windows.windows["calibration"].shape
        healing = heal(self.plan, self.setups["loss"], evaluation, shape, self.run, self.pool, self.track)
        assert healing is not None, "healing is on in the configuration"
        figures = healing.figures["test"]
        return (figures.after if healing.applied and figures.after else figures.before).kl


def measure(bench: Bench) -> dict[str, Figures]:
    """Format -> step -> figures."""
    formats = block_formats(bench.plan)
    figures: dict[str, Figures] = {fmt: {} for fmt in formats}
    for step in bench.setups:
        for fmt, e in zip(formats, bench.banked(step, formats, bench.test), strict=True):
            figures[fmt][step] = e.reconstruction, e.kl
    for name, encode in ENCODERS.items():
        for fmt in bench.track(formats, len(formats), f"encoding {name}"):
            figures[fmt][name] = bench.encoded(fmt, encode)
    validation = Fidelity("validation", bench.plan.config.text.tokens.validation)
    for fmt, e in zip(formats, bench.banked("refinement", formats, validation), strict=True):
        figures[fmt]["healing"] = figures[fmt]["refinement"][0], bench.healed(e)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/core/levels-all.yaml"))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config, console = load_config(args.config, args.overrides), Console()
    with open_pool(config.workers, config.name) as pool:
        figures = measure(Bench(config, pool, console))
    for index, title in enumerate(("reconstruction error over power", "KL on test text")):
        table = Table("format", *STEPS, "best / ggml", title=title, title_justify="left")
        for fmt, steps in figures.items():
            values = [steps[step][index] for step in STEPS]
            table.add_row(fmt, *(f"{v:.5f}" for v in values), f"{values[-1] / values[1]:.3f}")
        console.print(table)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
