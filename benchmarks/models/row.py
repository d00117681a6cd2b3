"""Measures one row of the table: ``python -m benchmarks.models.row NAME FOLDER RESULT CONVERTER [quantize]``.

The result, a JSON file, is written anew after each stage, so that a process that dies leaves how far it came.
"""

import contextlib
import io
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from benchmarks.models.case import Case, cases
from benchmarks.models.made import make_model
from benchmarks.models.quantized import quantize
from benchmarks.models.wiring import compare, convert, logits_error

VERSIONS = {name: version(name) for name in ("transformers", "xllamacpp")}
SHOWN = 300  # characters of a reason


def measure(case: Case, folder: Path, result: Path, converter: Path, quantized: bool = False) -> None:
    """Make the model, its template and the comparisons; leave figures, or the stage and the reason of a failure.

    With ``quantized`` a whole run searches, exports and proves it, too.
    """
    row: dict[str, Any] = {"name": case.name, "type": case.type, "variant": case.variant, "versions": VERSIONS}
    started = time.perf_counter()

    def enter(stage: str) -> None:
        row["stage"] = stage
        result.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")

    try:
        enter("model")
        with contextlib.redirect_stderr(io.StringIO()):
            model = make_model(case, folder)
        row["parameters"] = model.num_parameters()
        file = folder / "f32.gguf"
        enter("converter")
        convert(folder, file, converter, case.options)
        row["gguf"] = architecture_of(file)
        enter("llama.cpp")
        wiring = compare(model, folder, file)
        row |= {"wiring": wiring.error, "tokens": wiring.tokens}
        enter("generation")
        row["logits"] = logits_error(file, wiring)
        if quantized:
            enter("run")
            done = quantize(folder, file, folder.with_name(f"{case.name}-run"), case.bits)
            row |= {"mean_kl": done.mean_kl, "kl": done.eight_bit_to_runtime_kl}
        enter("done")
    except Exception as error:  # whatever a library raises is this row's result
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        row["failed"] = said.replace(str(folder), "the model")[:SHOWN]
    row["seconds"] = round(time.perf_counter() - started, 1)
    enter(row["stage"])


def architecture_of(file: Path) -> str:
    """Return llama.cpp's name of a file's architecture."""
    field = GGUFReader(file).get_field("general.architecture")
    assert field is not None
    return str(field.contents())


if __name__ == "__main__":
    name, made, written, source, *asked = sys.argv[1:]
    measure(cases()[name], Path(made), Path(written), Path(source), bool(asked))
