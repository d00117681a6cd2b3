"""llama.cpp itself, through xllamacpp: what the shipped file computes, and how fast.

Shapes: n windows, T positions, D hidden size. The server runs inside this process and listens on the loopback
interface only.
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
ERRORS = 1  # llama.cpp's log level: says on stderr why it refuses a file, else nothing
RAW = -1  # embd_normalize: leave the values alone


class LlamaCppError(RuntimeError):
    """llama.cpp could not load or run the file."""


@dataclass(frozen=True)
class Speed:
    """Tokens per second, as llama.cpp's own timings have it."""

    prompt: float
    generation: float
    prompt_tokens: int
    generated_tokens: int


class LlamaCppRuntime:
    """A running llama.cpp for windows of up to ``context`` tokens; a context manager.

    Each window is one batch in one sequence, with float32 keys and values and plain attention, so that the only
    differences from a float computation are those of llama.cpp's matrix products. Raises ValueError for a damaged
    file, LlamaCppError if llama.cpp refuses a sound one.
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
        self._window(np.zeros(1, dtype=np.int64))  # a server stopped before its first task never ends
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = self._server = None  # the server stops when it is collected

    def hidden_states(self, windows: np.ndarray) -> np.ndarray:
        """Final hidden states (n, T, D) float32 after the output norm, for token ids (n, T).

        Raises ValueError for windows longer than the context, LlamaCppError if llama.cpp answers otherwise than with
        one state for each token.
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
        """Token ids of ``text`` by llama.cpp's own tokenizer. Raises ValueError if the file holds none."""
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
    """Read a prompt and generate, with llama.cpp's defaults for cache and attention. Raises as LlamaCppRuntime."""
    contents = read_gguf(path)
    _require_tokenizer(contents)
    params = _params(contents, prompt_tokens + new_tokens, threads or default_threads())
    params.warmup = True
    server = _start(params)
    vocabulary = contents.tensors["token_embd.weight"].shape[0]
    prompt = [i % vocabulary for i in range(prompt_tokens)]  # any ids do: the time does not depend on them
    request = {"prompt": prompt, "n_predict": new_tokens, "ignore_eos": True, "cache_prompt": False, "temperature": 0.0}
    timings = server.handle_completions(request)["timings"]
    return Speed(
        timings["prompt_per_second"], timings["predicted_per_second"], timings["prompt_n"], timings["predicted_n"]
    )


def default_threads() -> int:
    """One for each two logical processors: llama.cpp's threads wait actively and starve each other on more."""
    return max(1, usable_cpus() // 2)


def _require_tokenizer(contents: GgufContents) -> None:
    """llama.cpp stops the process if a file without tokenizer is asked for text."""
    if contents.key_values.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        raise ValueError(f"expected a GGUF file with a tokenizer, found none in {contents.path}")


def _params(contents: GgufContents, context: int, threads: int) -> Any:
    """Settings common to all uses of a file that was read and found sound."""
    params = xllamacpp.CommonParams()
    params.model.path = str(contents.path)
    params.hostnames = [LOOPBACK]
    params.n_ctx = params.n_batch = params.n_ubatch = context
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.fit_params = False  # take these sizes, do not search for ones that fit a device
    params.cache_ram_mib = 0
    params.warmup = False
    params.verbosity = ERRORS
    return params


def _start(params: Any) -> Any:
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise LlamaCppError(f"llama.cpp cannot load {params.model.path}: {error}") from error
