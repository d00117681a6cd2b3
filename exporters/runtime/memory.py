"""Asks llama.cpp what a file takes on a device beside its weights: key-value cache and compute buffers.

llama.cpp builds the model's graph without allocating anything (``memory_probe``), so a file of which there is nothing
but the header will do, and every architecture, sliding window and recurrent state is counted as llama.cpp counts it.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from exporters.files.file_layout import FileLayout, Types, stored_bytes
from exporters.runtime.llamacpp import LlamaCppError, reason
from quantizers.formats.table import padded

PROBE = Path(__file__).with_name("memory_probe.py")
KV_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")  # of llama.cpp's --cache-type-k
# Rows of llama.cpp's table, in MiB, rounded down: of a device "|   - CUDA0 (name)   | 24564 = 22000 + (10000 = 8000 +
# 1500 + 500) + 2564 |", of the host's kinds of memory "|   - Host   |   294 =    92 +   180 +   22   |".
ROW = re.compile(r"\|\s+- [^|]+\|(?P<device>.*\()?.*?= +(?P<model>\d+) \+ +(?P<context>\d+) \+ +(?P<compute>\d+)\b")
TABLE = "memory breakdown [MiB]"
PROJECTOR = re.compile(r"\[mtmd\] estimated worst-case memory usage of mmproj is ([\d.]+) MiB")
MIB = 1 << 20
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class ContextMemory:
    """Holds what llama.cpp takes beside the weights, in bytes: its own figures in MiB, rounded up."""

    cache: int  # keys and values, and the states of recurrent layers
    compute: int  # buffers of the graph
    projector: int = 0  # with its own buffers


def context_memory(
    layout: FileLayout, types: Types, context: int, kv: str = "F16", mmproj: Path | None = None
) -> ContextMemory:
    """Return what llama.cpp takes for a file like ``layout`` beside its weights.

    ``types`` are those of its searched tensors, ``context`` is in tokens, ``kv`` the type of keys and values, of
    KV_TYPES, ``mmproj`` a projector that is loaded beside. Raises LlamaCppError, with llama.cpp's last words, if it
    cannot say.
    """
    with tempfile.TemporaryDirectory(prefix="bitgenome-") as folder:
        path = Path(folder) / "header.gguf"
        write_hollow(layout, types, path)
        return file_memory(path, context, kv, mmproj)


def write_hollow(layout: FileLayout, types: Types, path: Path) -> None:
    """Write the header of a file like ``layout``, and behind it a hole of the size of its data."""
    kinds = {tensor.name: types[tensor.name] for tensor in layout.searched}
    data = sum(
        padded(stored_bytes(kinds[tensor.name], tensor.shape) if tensor.searched else tensor.float_bytes)
        for tensor in layout.tensors
    )
    with path.open("wb") as file:
        file.write(layout.header(kinds, None))
        file.truncate(file.tell() + data)


def file_memory(path: Path, context: int, kv: str = "F16", mmproj: Path | None = None) -> ContextMemory:
    """Return what llama.cpp takes for the file at ``path`` beside its weights, as ``context_memory``."""
    wanted = {"path": str(path), "context": context, "kv": kv, "mmproj": str(mmproj) if mmproj else None}
    process = subprocess.Popen(
        [sys.executable, "-P", str(PROBE)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, errors="replace", env={**os.environ, "GGML_NO_BACKTRACE": "1"},
    )  # fmt: skip
    assert process.stdin is not None and process.stderr is not None
    late = threading.Timer(TIMEOUT_S, process.kill)
    late.start()
    said = ""
    try:
        with process, suppress(BrokenPipeError):
            process.stdin.write(json.dumps(wanted) + "\n")
            process.stdin.close()
            said = _until_first_table(process.stderr)
            process.kill()
    finally:
        late.cancel()
    return parse_memory(said, mmproj is not None)


def _until_first_table(lines: Iterable[str]) -> str:
    """Return the lines to the end of the first table; what follows may take long, if the file does not fit here."""
    said: list[str] = []
    table = False
    for line in lines:
        said.append(line)
        if table and not ROW.search(line):
            break
        table = table or TABLE in line
    return "".join(said)


def parse_memory(said: str, projected: bool = False) -> ContextMemory:
    """Return the figures of llama.cpp's first table of memory: of its devices or, without any, of the host.

    Raises LlamaCppError if there is no such table, or with ``projected`` no line on the projector.
    """
    rows = _first_table(said)
    if not rows:
        raise LlamaCppError(f"llama.cpp cannot say what memory it takes: {reason(said)}")
    rows = [row for row in rows if row["device"]] or rows
    found = PROJECTOR.search(said)
    if projected and not found:
        raise LlamaCppError(f"llama.cpp cannot say what memory the projector takes: {reason(said)}")
    projector = int(float(found[1]) * MIB) if found else 0
    cache, compute = (_rounded_up([int(row[key]) for row in rows]) for key in ("context", "compute"))
    return ContextMemory(cache, compute, projector)


def _rounded_up(mebibytes: Sequence[int]) -> int:
    """Return in bytes the sum of figures that were rounded down to MiB, of which none may be too small."""
    return (sum(mebibytes) + max(1, sum(map(bool, mebibytes)))) * MIB


def _first_table(said: str) -> list[re.Match[str]]:
    """Return the rows of the first table: llama.cpp shows others if it goes on to shrink what does not fit."""
    _, found, table = said.partition(TABLE)
    rows = []
    for line in table.splitlines()[1:] if found else ():
        match = ROW.search(line)
        if match is None:
            break
        rows.append(match)
    return rows
