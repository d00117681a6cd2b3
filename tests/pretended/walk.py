"""Runs every stage of a small model on the pretended accelerator, in a process of its own.

``python -m tests.pretended.walk FOLDER MODEL`` prints one JSON object: kernels by stage, and what the stages returned.
"""

import json
import sys
from pathlib import Path

from tests.pretended.accelerator import counted, counting, install

install()
from benchmarks import device_stages as stages  # noqa: E402 - after the device is there
from evaluators.engine.evaluator import GenomeEvaluator  # noqa: E402


def read_ahead(subject: stages.Subject) -> stages.Figures:
    """Read some weights in a thread, as a sweep does for its next block: subject has but one."""
    weights = GenomeEvaluator(subject.setup("auto")).sweep.weights
    keys = [(gene.name, fmt) for gene in subject.space.genes[:3] for fmt in (None, gene.formats[0])]
    weights.fetch_ahead(keys)
    return {"unit": "bytes", "work": sum(weights.get(*key).nbytes for key in keys)}


def by_loss(subject: stages.Subject, *, inside: bool) -> stages.Figures:
    """Round a group inside the block on both sides, or the tied embedding by its rows."""
    task = next(task for task in stages.two_sided_tasks(subject) if (".layers." in task.label) == inside)
    return stages.build_groups([task], 1, lambda figures: None)


def main(folder: Path, model: Path) -> None:
    """Walk through the stages of ``model``; everything that is made goes below ``folder``."""
    subject = stages.Subject("walk", model, folder, ("W2", "W8"), ("IQ2_XXS",), **stages.LITTLE_WORK)
    work = {
        "calibration": lambda: stages.calibrate(subject),
        "bank": lambda: stages.build_bank(subject, lambda figures: None),
        "codebooks": lambda: stages.build_codebooks(subject),
        "outputs": lambda: stages.measure_outputs(subject),
        "two-sided": lambda: by_loss(subject, inside=True),
        "rows": lambda: by_loss(subject, inside=False),
        "resident": lambda: stages.sweep(subject, "float32"),
        "streamed": lambda: stages.sweep(subject, "auto", stages.least_memory(subject)),
        "read ahead": lambda: read_ahead(subject),
        "gradient": lambda: stages.gradient(subject),
        "exact": lambda: stages.exact(subject, 2),
        "healing": lambda: stages.heal_whole(subject),
        "blocks": lambda: stages.heal_blocks(subject, subject.layers + 1),
        "proof": lambda: stages.simulated_proof(subject),
    }
    found = {}
    for stage, run in work.items():
        with counting(stage):
            found[stage] = run()
        subject.state.clear()
    sys.stdout.write(json.dumps({"kernels": counted.kernels, "figures": found, "weights": subject.weights}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
