"""Which text calibrates best: what the model writes itself, an encyclopedia, Python code, chats, or a mix.

Every source gives the same number of calibration tokens; the bank is built at one level for all tensors, without a
search; the KL is measured on held-out text of each kind, in float32. The chats are stories that a user asks for by
their first sentence, unless a file of conversations is given.

    python -m benchmarks.text_sources MODEL --calibration wiki.valid.txt --test wiki.test.txt --stories stories.txt
        [--chat turns.jsonl] [--sources self wikitext ...] [--tokens 32768] [--level W3] [--work FOLDER]

What is done is kept in the work folder, from which an interrupted measurement goes on.
"""

import argparse
import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bitgenome.common.files import atomic_write_bytes, atomic_write_json
from bitgenome.config.text import TextConfig, TokensConfig
from bitgenome.observe.progress import tracker
from bitgenome.plan.text import read_windows, ready_windows
from bitgenome.run.calibration import calibrate
from bitgenome.run.writing import written_windows
from evaluators.data.windows import TokenWindows, windows_digest
from evaluators.engine.evaluator import EvaluateGenomes, EvaluatorSetup
from evaluators.model.folder import ModelFolder
from evaluators.prepare.bank import BuildBankGroup, readable
from evaluators.prepare.input_group import group_file
from exporters.files.gguf_writer import fixed_bytes
from exporters.metadata.tensor_names import quantizable_tensors
from quantizers.settings import CompensationSettings
from search.fitness import FitnessSettings
from search.types import Fidelity, SearchSpace
from workers.pool.base import SerialPool

log = logging.getLogger(__name__)

SOURCES = ("self", "wikitext", "stdlib", "chat", "self+wikitext")
STORY_END = "<|endoftext|>"
REQUEST = "Tell me a story that begins like this: "


@dataclass(frozen=True)
class Stored:
    """Settings that text and calibration read."""

    storage_path: Path
    text: TextConfig
    storage_url: str | None = None


@dataclass(frozen=True)
class Subject:
    """A model and a text."""

    config: Stored
    folder: ModelFolder


def stories(path: Path) -> Iterator[str]:
    """Yield the stories of a file, which end with an end-of-text mark or, without any, with a blank line."""
    text = path.read_text(encoding="utf-8")
    for story in text.split(STORY_END if STORY_END in text else "\n\n"):
        if len(story.split()) > 40:
            yield " ".join(story.split())


def write_chats(source: Path, target: Path) -> None:
    """Write conversations in which a user asks for each story by its first sentence."""
    with target.open("w", encoding="utf-8") as file:
        for story in stories(source):
            first = story.partition(". ")[0]
            turns = [{"role": "user", "content": REQUEST + first}, {"role": "assistant", "content": story}]
            file.write(json.dumps({"messages": turns}) + "\n")


def settings_of(arguments: argparse.Namespace, chat: Path) -> Mapping[str, Any]:
    """Return the settings of each source of calibration text."""
    wikitext = {"source": "file", "path": arguments.calibration}
    own = {"source": "self", "fills": ("calibration",)}
    rest = {"source": "stdlib", "fills": ("search", "validation", "test")}  # which nothing reads
    return {
        "self": {"source": [own, rest]},
        "wikitext": wikitext,
        "stdlib": {"source": "stdlib"},
        "chat": {"source": "chat", "path": chat},
        "self+wikitext": {"source": [own, wikitext]},
    }


def test_windows(found: Mapping[str, Subject]) -> dict[str, TokenWindows]:
    """Return the held-out text of each kind."""
    return {name: read_windows(subject) for name, subject in found.items()}


def measure(
    subject: Subject, windows: TokenWindows, tests: Mapping[str, TokenWindows], level: str, work: Path, console: Console
) -> dict[str, Any]:
    """Return the KL of each test text by windows, for a bank at ``level`` that ``windows`` calibrated."""
    pool, track, started = SerialPool(arguments_threads()), tracker(console), time.time()
    calibration, groups = calibrate(subject, windows, pool, track)
    folder = subject.folder
    space = SearchSpace.per_tensor(quantizable_tensors(folder), (level,), fixed_bytes(folder))
    bank = work / "bank"
    bank.mkdir(parents=True, exist_ok=True)
    formats = {gene.name: tuple(f.name for f in gene.formats) for gene in space.genes}
    missing = {name for name, fmts in formats.items() if not readable(bank, name, fmts)}
    files = [group_file(calibration, group) for group in groups]
    tasks = (
        [BuildBankGroup(folder.path, file, bank, formats, CompensationSettings()) for file in files] if missing else []
    )
    for _ in track(pool.map(tasks), len(tasks), "building the bank"):
        pass
    genome, found = tuple(0 for _ in space.genes), {}
    for name, text in tests.items():
        file = (work / f"{name}.safetensors").resolve()
        atomic_write_bytes(file, text.to_bytes())
        setup = EvaluatorSetup(folder.path, bank.resolve(), file, space, FitnessSettings(), f"{bank} {file}")
        tokens = text.windows["test"].size
        ((evaluation,),) = pool.map([EvaluateGenomes(setup, (genome,), Fidelity("test", tokens), name)])
        found[name] = {"kl": evaluation.kl, "windows": list(evaluation.window_kl), "perplexity": evaluation.perplexity}
        log.info("%s: KL %.5f", name, evaluation.kl)
    return {"tests": found, "bytes": space.file_bytes(genome), "seconds": time.time() - started}


def arguments_threads() -> int:
    """Return the threads of the pool: all that this process has."""
    import torch  # noqa: PLC0415 - after the command line is read

    return torch.get_num_threads()


def show(results: Mapping[str, Any], console: Console) -> None:
    """Show the KL by source and test text, with the paired standard error of the difference to the first source."""
    names = list(next(iter(results.values()))["tests"])
    table = Table(title="KL by calibration text (rows) and test text", title_justify="left")
    for column in ("calibrated on", *names):
        table.add_column(column, justify="left" if column == "calibrated on" else "right")
    first = next(iter(results))
    for source, result in results.items():
        cells = []
        for name in names:
            own, base = (np.array(results[s]["tests"][name]["windows"]) for s in (source, first))
            error = (own - base).std(ddof=1) / np.sqrt(len(own)) if len(own) > 1 else 0.0
            kl = result["tests"][name]["kl"]
            cells.append(f"{kl:.5f}" if source == first else f"{kl:.5f} ({(own - base).mean():+.5f} ± {error:.5f})")
        table.add_row(source, *cells)
    console.print(table)


def main() -> None:
    """Measure the sources that have no result yet, and show all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="text of the kind of the test text")
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--stories", type=Path, help="of which chats are made")
    parser.add_argument("--chat", type=Path, help="JSON lines of conversations, in place of stories")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES)
    parser.add_argument("--tokens", type=int, default=32768, help="of calibration")
    parser.add_argument("--test-tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--level", default="W3")
    parser.add_argument("--work", type=Path, default=Path("text-sources"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    console, folder = Console(width=160), ModelFolder(arguments.model.resolve())
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    chat = arguments.chat or work / "chat.jsonl"
    if not arguments.chat:
        write_chats(arguments.stories, chat)
    sizes = TokensConfig(
        calibration=arguments.tokens, sensitivity=arguments.window, search=arguments.window,
        validation=arguments.window, test=arguments.test_tokens,
    )  # fmt: skip

    def subject(settings: Mapping[str, Any], tokens: TokensConfig) -> Subject:
        text = TextConfig(window=arguments.window, tokens=tokens, **settings)
        return Subject(Stored(work, text), folder)

    settings = settings_of(arguments, chat)
    held_out = {
        "wikitext": {"source": "file", "path": arguments.test},
        "chat": settings["chat"],
        "python": settings["stdlib"],
    }
    small = sizes.model_copy(update={"calibration": arguments.window})
    tests = test_windows({name: subject(found, small) for name, found in held_out.items()})
    alone = sizes.model_copy(update={"test": arguments.window})
    file = work / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for source in arguments.sources:
        if source in results:
            continue
        log.info("calibrating on %s", source)
        own = subject(settings[source], alone)
        pool = SerialPool(arguments_threads())
        started = time.time()
        windows = written_windows(own, ready_windows(own), pool, tracker(console), lambda _: nullcontext())
        written = time.time() - started
        digest = windows_digest({"calibration": windows.windows["calibration"]})[:12]
        results[source] = measure(own, windows, tests, arguments.level, work / source / digest, console)
        results[source] |= {"text_seconds": written}
        atomic_write_json(file, results)
    show({source: results[source] for source in arguments.sources}, console)


if __name__ == "__main__":
    main()
