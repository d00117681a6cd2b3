"""Asks llama.cpp for what a GGUF file writes, and how fast: answers, greedy continuations, tokens per second."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from exporters.runtime.llamacpp import Server, require_tokenizer

CHAT_TEMPLATE = "tokenizer.chat_template"
PROMPT_TOKENS, NEW_TOKENS = 128, 64  # of a measurement of speed
GREEDY = {"temperature": 0.0, "cache_prompt": False}


@dataclass(frozen=True)
class Speed:
    """Speed of prompt and generation in tokens per second, as timed by llama.cpp."""

    prompt: float
    generation: float
    prompt_tokens: int
    generated_tokens: int


class TextServer(Server):
    """A context manager that runs a file in llama.cpp with its own defaults, warmed up, and lets it write.

    ``context`` is the most tokens of a prompt and what follows it. Raises what Server raises, and ValueError for a file
    without a tokenizer.
    """

    def __init__(self, path: str | Path, context: int, threads: int | None = None, timeout_seconds: float = 600.0):
        super().__init__(path, context, threads, timeout_seconds, states=False)
        require_tokenizer(self.contents)

    @property
    def chats(self) -> bool:
        """Whether the file has a chat template."""
        return CHAT_TEMPLATE in self.contents.key_values

    def speed(self, prompt_tokens: int = PROMPT_TOKENS, new_tokens: int = NEW_TOKENS, times: int = 1) -> Speed:
        """Return the speed of prompt and generation, the median of as many ``times``."""
        vocabulary = len(self.contents.key_values["tokenizer.ggml.tokens"])  # also of the first of a file's shards
        prompt = [i % vocabulary for i in range(prompt_tokens)]  # the time does not depend on the ids
        request = {"prompt": prompt, "n_predict": new_tokens, "ignore_eos": True, **GREEDY}
        found = [self.ask("/completion", request)["timings"] for _ in range(times)]

        def of(name: str) -> float:
            return float(median(timings[name] for timings in found))

        counts = found[0]["prompt_n"], found[0]["predicted_n"]
        return Speed(of("prompt_per_second"), of("predicted_per_second"), *counts)

    def answer(self, prompt: str, max_tokens: int) -> str:
        """Return the most likely answer to ``prompt`` by the chat template, or without one what goes on from it."""
        if not self.chats:
            answer = self.ask("/completion", {"prompt": prompt, "n_predict": max_tokens, **GREEDY})
            return str(answer["content"])
        messages = [{"role": "user", "content": prompt}]
        found = self.ask("/v1/chat/completions", {"messages": messages, "max_tokens": max_tokens, **GREEDY})
        message: dict[str, Any] = found["choices"][0]["message"]
        return str(message.get("reasoning_content") or "") + str(message.get("content") or "")

    def greedy(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """Return the ``tokens`` most likely token ids after the ids of ``prompt``, an end of text included."""
        request = {"prompt": list(prompt), "n_predict": tokens, "ignore_eos": True, "return_tokens": True, **GREEDY}
        return [int(token) for token in self.ask("/completion", request)["tokens"]]


def generation_speed(
    path: str | Path, prompt_tokens: int = PROMPT_TOKENS, new_tokens: int = NEW_TOKENS, threads: int | None = None
) -> Speed:
    """Measure the speed of prompt and generation with llama.cpp's defaults for KV cache and attention.

    Raises what TextServer raises.
    """
    with TextServer(path, prompt_tokens + new_tokens, threads) as server:
        return server.speed(prompt_tokens, new_tokens)
