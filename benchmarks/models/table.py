"""Makes the table of docs/models.md of the rows' results."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.models.case import cases

RESULTS = Path(__file__).with_name("results")
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TOLERANCE = 1e-5  # of the wiring
LOGITS_TOLERANCE = 1e-2
HEADER = ("type", "GGUF", "wiring", "logits", "tokens", "KL to runtime", "remark")
WORDS = """# Models

Which model types run, made by `python -m benchmarks.models`; do not edit. Every row is a small model with random
weights from transformers' own configuration class, its file by llama.cpp's converter, and llama.cpp as in xllamacpp
({versions}).

- **wiring**: relative error of the final hidden states of the F32 file in llama.cpp against transformers, over 256
  positions; at most 1e-5 where both compute the same.
- **logits**: mean difference of the 64 likeliest tokens' log probabilities after the first 128 positions, over the
  deviation of the logits: the head with its scale, bias and cap. llama.cpp generates with a KV cache in half precision.
- **tokens**: whether llama.cpp makes the same ids of a text as the model's own tokenizer.
- **KL to runtime**: after quantization through a run with the converter's file as template: KL of the simulation, with
  llama.cpp's 8-bit inputs, to llama.cpp, in nats a token. Random weights amplify the gap.
- Types whose layers are few kinds are made with each kind; `type-variant` has the settings that it is named for.

{counts}

## Must run

{required}

## Further types

{further}
"""


def rows() -> list[dict[str, Any]]:
    """Return the whole results that are there, in the order of the cases."""
    files = [RESULTS / f"{case.name}.json" for case in cases().values()]
    notes = {case.name: case.note for case in cases().values()}
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    whole = [row for row in found if row["stage"] == "done" or "failed" in row]
    return [row | {"note": notes[row["name"]]} for row in whole]


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return a row of the table."""
    wiring = f"{row['wiring']:.1e}" if "wiring" in row else "-"
    if row.get("wiring", 0.0) > TOLERANCE:
        wiring = f"**{wiring}**"
    logits = f"{row['logits']:.1e}" if "logits" in row else "-"
    if row.get("logits", 0.0) > LOGITS_TOLERANCE:
        logits = f"**{logits}**"
    kl = f"{row['kl']:.1e}" if "kl" in row else "-"
    failed = f"{row['stage']}: {row['failed']}" if "failed" in row else ""
    remark = "; ".join(part for part in (failed, row.get("note", "")) if part)
    return row["name"], row.get("gguf", "-"), wiring, logits, row.get("tokens", "-"), kl, remark.replace("|", "\\|")


def show(console: Console, shown: list[dict[str, Any]]) -> None:
    """Print rows as a table."""
    table = Table(*HEADER)
    for row in shown:
        table.add_row(*cells(row))
    console.print(table)


def write_page() -> None:
    """Write docs/models.md."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """Return docs/models.md of the results that are there."""
    found = rows()
    required = {case.name for case in cases().values() if case.required}
    agreeing = [row for row in found if agrees(row)]
    run = sum("wiring" in row for row in found)
    versions = {f"{name} {number}" for row in found for name, number in row.get("versions", {}).items()}
    return WORDS.format(
        versions=", ".join(sorted(versions)),
        counts=f"{len(found)} rows: {len(agreeing)} run and agree, {run - len(agreeing)} run and disagree, "
        f"{len(found) - run} do not run.",
        required=_markdown([row for row in found if row["name"] in required]),
        further=_markdown([row for row in found if row["name"] not in required]),
    )


def agrees(row: dict[str, Any]) -> bool:
    """Return whether llama.cpp and transformers compute the same."""
    return bool(row.get("wiring", 1.0) <= TOLERANCE and row.get("logits", 0.0) <= LOGITS_TOLERANCE)


def _markdown(shown: list[dict[str, Any]]) -> str:
    lines = [HEADER, tuple("---" for _ in HEADER), *map(cells, shown)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
