"""Measures one file in llama.cpp, which is a process of its own: what it takes, how fast it is, and what it writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from bitgenome.common.devices import free_host_memory
from bitgenome.compare.subjects import Subject
from exporters.runtime.text import NEW_TOKENS, PROMPT_TOKENS, TextServer

GREEDY_PROMPTS, GREEDY_PROMPT_TOKENS, GREEDY_TOKENS = 16, 64, 32
SPEED_TIMES = 3  # of which the median counts
LEAST_CONTEXT = 512
TEMPLATE_TOKENS = 256  # that a chat template may add to a prompt
CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Written:
    """Holds what llama.cpp took to run a file with its own defaults, and what the file wrote."""

    load_seconds: float  # until it is ready, the file in the page cache
    prompt_tokens_per_second: float
    generated_tokens_per_second: float
    peak_bytes: int | None  # of the process, mapped pages of the file included; None where not known
    answers: tuple[str, ...]  # to the prompts
    greedy: tuple[tuple[int, ...], ...]  # token ids after the beginnings of windows


@dataclass(frozen=True)
class Divergence:
    """Holds where greedy continuations leave those of the original.

    ``first`` is, for each prompt, the number of tokens that are the same before the first that differs, None where all
    of them are.
    """

    first: tuple[int | None, ...]
    tokens: int

    @classmethod
    def of(cls, ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> "Divergence":
        """Return where each of ``ours`` leaves its continuation among ``theirs``."""
        first = tuple(
            next((place for place, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), None)
            for a, b in zip(ours, theirs, strict=True)
        )
        return cls(first, len(theirs[0]))

    @property
    def same(self) -> float:
        """Share of the prompts whose continuations are the same to the end."""
        return sum(place is None for place in self.first) / len(self.first)

    @property
    def median_first(self) -> float:
        """Median number of tokens before the first that differs; a continuation that is the same counts them all."""
        return float(median(self.tokens if place is None else place for place in self.first))


def beginnings(windows: np.ndarray) -> list[list[int]]:
    """Return the first tokens of some of ``windows`` (n, T), at most half of each, for greedy continuations."""
    taken = min(GREEDY_PROMPT_TOKENS, windows.shape[1] // 2)
    found: list[list[int]] = windows[:GREEDY_PROMPTS, :taken].tolist()
    return found


def written_by(subject: Subject, prompts: Sequence[str], max_tokens: int, begun: Sequence[Sequence[int]]) -> Written:
    """Let llama.cpp run a file: its speed, its answers to ``prompts``, and greedy continuations of ``begun`` token ids.

    Raises ValueError for a file without a tokenizer, LlamaCppError if llama.cpp cannot run it.
    """
    for part in subject.model.parts:
        read_through(part.path)
    longest = max((len(prompt.encode()) for prompt in prompts), default=0)  # bytes; tokens are no more
    context = max(LEAST_CONTEXT, PROMPT_TOKENS + NEW_TOKENS, longest + max_tokens + TEMPLATE_TOKENS)
    with TextServer(subject.path, context) as server:
        speed = server.speed(times=SPEED_TIMES)
        answers = tuple(server.answer(prompt, max_tokens) for prompt in prompts)
        greedy = tuple(tuple(server.greedy(prompt, GREEDY_TOKENS)) for prompt in begun)
        return Written(server.load_seconds, speed.prompt, speed.generation, server.peak_bytes, answers, greedy)


def read_through(path: Path) -> None:
    """Read a file once, so that all are loaded from the page cache, if it fits into what memory is free."""
    if path.stat().st_size > free_host_memory():
        return
    with path.open("rb") as file:
        while file.read(CHUNK_BYTES):
            pass
