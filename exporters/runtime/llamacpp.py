"""Runs GGUF files in llama.cpp through xllamacpp, for their hidden states, their tokens and their speed.

Shapes: n windows, T positions, D hidden size. The server runs inside this process and listens only on the loopback
interface.
"""

import http.client
import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import xllamacpp

from bitgenome.common.cpus import usable_cpus
from exporters.files.gguf_reader import GgufContents, read_gguf

LOOPBACK = "127.0.0.1"
ERRORS = 1  # llama.cpp's log level; it prints to stderr why it refuses a file, and nothing else
RAW = -1  # embd_normalize: no normalization


class LlamaCppError(RuntimeError):
    """Raised if llama.cpp cannot load or run a file."""


@dataclass(frozen=True)
class Speed:
    """Speed of prompt and generation in tokens per second, as timed by llama.cpp."""

    prompt: float
    generation: float
    prompt_tokens: int
    generated_tokens: int


class LlamaCppRuntime:
    """A context manager that runs a file in llama.cpp on windows of up to ``context`` tokens.

    Each window is one batch of one sequence, with a float32 KV cache and without flash attention, so that only
    llama.cpp's matrix products differ from a float computation. Requests time out after ``timeout_seconds``. Raises
    ValueError for a damaged file, and on entry LlamaCppError if llama.cpp refuses the file.
    """

    def __init__(self, path: str | Path, context: int, threads: int | None = None, timeout_seconds: float = 600.0):
        self.contents = read_gguf(path)
        self.context = context
        self.threads = threads or default_threads()
        self.timeout_seconds = timeout_seconds
        self._server: Any = None
        self._connection: http.client.HTTPConnection | None = None

    def __enter__(self) -> "LlamaCppRuntime":
        params = _params(self.contents, self.context, self.threads)
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server = _start(params)
        address = urlsplit(self._server.listening_address)
        self._connection = http.client.HTTPConnection(address.hostname, address.port, timeout=self.timeout_seconds)
        self._window(np.zeros(1, dtype=np.int64))  # a server that is stopped before its first task hangs
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = self._server = None  # the server stops when it is garbage-collected

    def hidden_states(self, windows: np.ndarray) -> np.ndarray:
        """Return final hidden states, float32 (n, T, D) after the output norm, for token ids ``windows`` (n, T).

        Raises ValueError for windows longer than the context, and LlamaCppError unless llama.cpp returns one state
        for each token.
        """
        if windows.ndim != 2 or windows.shape[1] > self.context:
            raise ValueError(f"expected windows (n, T <= {self.context}), found shape {windows.shape}")
        return np.stack([self._window(window) for window in windows])

    def _window(self, window: np.ndarray) -> np.ndarray:
        answer = self._post("/embedding", {"content": window.tolist(), "embd_normalize": RAW})
        states = np.asarray(answer[0]["embedding"], dtype=np.float32)
        if states.shape[0] != len(window):
            raise LlamaCppError(f"expected {len(window)} hidden states, found {states.shape[0]}")
        return states

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        """Return the token ids of ``text`` from llama.cpp's own tokenizer, with BOS and the like if ``add_special``.

        Raises ValueError if the file has no tokenizer, LlamaCppError if llama.cpp gives no valid answer.
        """
        _require_tokenizer(self.contents)
        return list(self._post("/tokenize", {"content": text, "add_special": add_special})["tokens"])

    def _post(self, route: str, body: dict[str, Any]) -> Any:
        if self._connection is None:
            raise LlamaCppError("the runtime is not running: use it in a with statement")
        try:
            self._connection.request("POST", route, json.dumps(body), {"Content-Type": "application/json"})
            response = self._connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise LlamaCppError(f"llama.cpp gave no answer to {route}: {error}") from error
        if response.status != http.HTTPStatus.OK:
            raise LlamaCppError(f"llama.cpp refused {route}: {answer.decode(errors='replace')[:300]}")
        return json.loads(answer)


def generation_speed(
    path: str | Path, prompt_tokens: int = 128, new_tokens: int = 64, threads: int | None = None
) -> Speed:
    """Measure the speed of prompt and generation with llama.cpp's defaults for KV cache and attention.

    Raises as LlamaCppRuntime does, and ValueError for a file without a tokenizer.
    """
    contents = read_gguf(path)
    _require_tokenizer(contents)
    params = _params(contents, prompt_tokens + new_tokens, threads or default_threads())
    params.warmup = True
    server = _start(params)
    vocabulary = contents.tensors["token_embd.weight"].shape[0]
    prompt = [i % vocabulary for i in range(prompt_tokens)]  # the time does not depend on the ids
    request = {"prompt": prompt, "n_predict": new_tokens, "ignore_eos": True, "cache_prompt": False, "temperature": 0.0}
    timings = server.handle_completions(request)["timings"]
    return Speed(
        timings["prompt_per_second"], timings["predicted_per_second"], timings["prompt_n"], timings["predicted_n"]
    )


def default_threads() -> int:
    """Return half the usable logical processors: llama.cpp's threads busy-wait, and more would starve each other."""
    return max(1, usable_cpus() // 2)


def _require_tokenizer(contents: GgufContents) -> None:
    """Raise ValueError for a file without a tokenizer: on text requests llama.cpp would abort the process."""
    if contents.key_values.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        raise ValueError(f"expected a GGUF file with a tokenizer, found none in {contents.path}")


def _params(contents: GgufContents, context: int, threads: int) -> Any:
    """Return the settings that all uses of a file share."""
    params = xllamacpp.CommonParams()
    params.model.path = str(contents.path)
    params.hostnames = [LOOPBACK]
    params.n_ctx = params.n_batch = params.n_ubatch = context
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.fit_params = False  # use these sizes instead of searching for ones that fit a device
    params.cache_ram_mib = 0
    params.warmup = False
    params.verbosity = ERRORS
    return params


def _start(params: Any) -> Any:
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise LlamaCppError(f"llama.cpp cannot load {params.model.path}: {error}") from error
