"""Runs GGUF files in llama.cpp through xllamacpp, for their hidden states and tokens; ``text`` lets them write.

Shapes: n windows, T positions, D hidden size. The server is a process of its own (``exporters.runtime.server``), since
llama.cpp aborts its process where it dislikes a file; it listens only on the loopback interface.
"""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import numpy as np

from bitgenome.common.cpus import usable_cpus
from bitgenome.common.steps import steps
from exporters.files.gguf_reader import GgufContents, read_gguf

SERVER = Path(__file__).with_name("server.py")
DEATH_S = 5.0  # within which a process that gave no answer shows whether it has died
LAST_WORDS = 300  # characters shown of what llama.cpp said last
SOURCE_FOLDER = re.compile(r"^/\S*/(?=\S+:\d+: )")  # of "/where/it/was/built/llama-vocab.cpp:2665: "
ERROR_LINE = re.compile(r"^[\d.]+ E (?:\w+ +)*?(?=\w+: )")  # of "0.00.033.924 E srv load_model: failed"
PEAK = re.compile(r"VmHWM:\s*(\d+) kB")  # of proc_pid_status(5)
RAW = -1  # embd_normalize: no normalization


class LlamaCppError(RuntimeError):
    """Raised if llama.cpp cannot load or run a file, or dies of it."""


class Server:
    """A context manager that runs a file in llama.cpp in a process of its own, and asks it over HTTP.

    ``context`` is the most tokens of a request, ``states`` whether hidden states are wanted or text. Requests time out
    after ``timeout_seconds``. Raises ValueError for a damaged file; entering and asking raise LlamaCppError, with
    llama.cpp's last words, if it refuses the file or dies.
    """

    def __init__(self, path: str | Path, context: int, threads: int | None, timeout_seconds: float, states: bool):
        self.contents = read_gguf(path)
        self.context = context
        self.timeout_seconds = timeout_seconds
        file = str(Path(path).absolute())
        self._settings = {"path": file, "context": context, "threads": threads or default_threads(), "states": states}
        self._connection: http.client.HTTPConnection | None = None
        self.load_seconds = 0.0  # that llama.cpp took until it was ready, its libraries loaded before

    def __enter__(self) -> Self:
        self._said = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # ggml would start a debugger before it aborts
        )  # fmt: skip
        try:
            self._connect()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _connect(self) -> None:
        """Hand the settings to the process, and connect to the address that it tells."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(self._settings).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # it has died already: the next line is empty
            pass
        line = self._process.stdout.readline()
        if not line:
            raise LlamaCppError(f"llama.cpp cannot load {self.contents.path}: {self._end()}")
        told, seconds = line.decode().split()
        address, self.load_seconds = urlsplit(told), float(seconds)
        self._connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=self.timeout_seconds)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._process.kill()  # it has nothing to save, and llama.cpp's own ending may hang
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()

    def ask(self, route: str, body: dict[str, Any]) -> Any:
        """Return the answer to a request, from JSON. Raises LlamaCppError if there is none, or a refusal."""
        if self._connection is None:
            raise LlamaCppError("the runtime is not running: use it in a with statement")
        try:
            try:
                status, answer = self._answer(route, body)
            except (ConnectionError, http.client.BadStatusLine):
                if self._process.poll() is not None:
                    raise
                self._connection.close()  # llama.cpp drops what is idle for 5 s; the next request connects anew
                status, answer = self._answer(route, body)
        except TimeoutError:
            raise LlamaCppError(f"llama.cpp gave no answer to {route} within {self.timeout_seconds:g} s") from None
        except (OSError, http.client.HTTPException):
            raise LlamaCppError(f"llama.cpp gave no answer to {route}: {self._end()}") from None
        if status != http.HTTPStatus.OK:
            raise LlamaCppError(f"llama.cpp refused {route}: {answer.decode(errors='replace')[:LAST_WORDS]}")
        return json.loads(answer)

    def _answer(self, route: str, body: dict[str, Any]) -> tuple[int, bytes]:
        """Return the status and the content of what the process answers to one request."""
        assert self._connection is not None
        self._connection.request("POST", route, json.dumps(body), {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        return response.status, response.read()

    @property
    def peak_bytes(self) -> int | None:
        """The most memory that the process has taken so far, mapped pages of the file included; None where not known.

        Memory of accelerators is not in it.
        """
        try:
            said = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii", errors="replace")
        except OSError:  # there is none outside Linux
            return None
        found = PEAK.search(said)
        return int(found[1]) << 10 if found else None

    def _end(self) -> str:
        """Return how the process ended, and what it said last."""
        try:
            code = self._process.wait(DEATH_S)
        except subprocess.TimeoutExpired:
            return "its process hangs"
        self._said.seek(0)
        said = self._said.read().decode(errors="replace")
        if code >= 0:
            return f"it refused it, saying: {reason(said)}"
        name = signal.Signals(-code).name
        hint = " (the system kills where memory runs out)" if -code == signal.SIGKILL else ""
        return f"it died by {name}{hint}, saying: {last_words(said)}"


def reason(said: str) -> str:
    """Return the first error that llama.cpp logged, which is the cause of those after it."""
    errors = [line for line in said.splitlines() if ERROR_LINE.match(line)]
    return ERROR_LINE.sub("", errors[0])[:LAST_WORDS] if errors else last_words(said)


def last_words(said: str) -> str:
    """Return the last line that llama.cpp wrote, without the folder in which it was built."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return SOURCE_FOLDER.sub("", lines[-1])[:LAST_WORDS] if lines else "nothing"


class LlamaCppRuntime(Server):
    """A context manager that runs a file in llama.cpp on windows of up to ``context`` tokens.

    Each window is one batch of one sequence, with a float32 KV cache and without flash attention, so that only
    llama.cpp's matrix products differ from a float computation. Raises what Server raises.
    """

    def __init__(self, path: str | Path, context: int, threads: int | None = None, timeout_seconds: float = 600.0):
        super().__init__(path, context, threads, timeout_seconds, states=True)

    def hidden_states(self, windows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Return final hidden states, float32 (n, T, D) after the output norm, for token ids ``windows`` (n, T).

        They are written to ``out`` where it is given, such as a mapped file, a window at a time. Raises ValueError for
        windows longer than the context, and LlamaCppError unless llama.cpp returns one state for each token.
        """
        if windows.ndim != 2 or windows.shape[1] > self.context:
            raise ValueError(f"expected windows (n, T <= {self.context}), found shape {windows.shape}")
        each = steps(windows, len(windows), "window")
        if out is None:
            return np.stack([self._window(window) for window in each])
        for states, window in zip(out, each, strict=True):
            states[:] = self._window(window)
        return out

    def _window(self, window: np.ndarray) -> np.ndarray:
        answer = self.ask("/embedding", {"content": window.tolist(), "embd_normalize": RAW})
        states = np.asarray(answer[0]["embedding"], dtype=np.float32)
        if states.shape[0] != len(window):
            raise LlamaCppError(f"expected {len(window)} hidden states, found {states.shape[0]}")
        return states

    def next_token(self, prompt: np.ndarray, count: int) -> dict[int, float]:
        """Return llama.cpp's log probabilities, in nats, of the ``count`` likeliest tokens after the ids ``prompt``.

        Empty if what it generates from there begins with no whole character. The prompt must leave room in the context.
        Raises ValueError if the file has no tokenizer, LlamaCppError if llama.cpp gives no valid answer.
        """
        require_tokenizer(self.contents)
        request = {
            "prompt": prompt.tolist(),
            "n_predict": 4,  # a token may be part of a character, which is waited for
            "ignore_eos": True,  # of the token drawn; the probabilities are those before
            "n_probs": count,
            "cache_prompt": False,
            "temperature": 0.0,
        }
        generated = self.ask("/completion", request).get("completion_probabilities")
        return {token["id"]: token["logprob"] for token in generated[0]["top_logprobs"]} if generated else {}

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the token ids of ``text`` from llama.cpp's own tokenizer, with BOS and the like if ``add_special``.

        With ``parse_special`` names of special tokens in the text become these. Raises ValueError if the file has no
        tokenizer, LlamaCppError if llama.cpp gives no valid answer.
        """
        require_tokenizer(self.contents)
        request = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return list(self.ask("/tokenize", request)["tokens"])


def default_threads() -> int:
    """Return half the usable logical processors: llama.cpp's threads busy-wait, and more would starve each other."""
    return max(1, usable_cpus() // 2)


def require_tokenizer(contents: GgufContents) -> None:
    """Raise ValueError for a file without a tokenizer: on text requests llama.cpp would abort the process."""
    if contents.key_values.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        raise ValueError(f"expected a GGUF file with a tokenizer, found none in {contents.path}")
