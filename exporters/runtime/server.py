"""Serves one GGUF file by llama.cpp, as a process of its own, which ``exporters.runtime.llamacpp`` starts.

The parent writes the settings to this process's standard input, a JSON object in a line, and reads a line from its
standard output: the server's address and the seconds that llama.cpp took until it was ready. The process ends as soon
as its standard input is closed, however the parent ends. It is run by its path and imports nothing of the project, so
that it starts in a sixth of a second.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from typing import Any

import xllamacpp

ERRORS = 1  # llama.cpp's log level; it prints to stderr why it refuses a file, and nothing else
STDIN = 0
PR_SET_PDEATHSIG = 1  # prctl(2)
REFUSED = 1  # exit code
LOOPBACK = "127.0.0.1"


def server_settings(wanted: dict[str, Any]) -> Any:
    """Return llama.cpp's settings; ``wanted`` has ``path``, ``context``, ``threads`` and ``states``.

    With ``states`` the server returns hidden states, of windows that are one batch of one sequence each, with a float32
    KV cache and without flash attention; else it generates text, warmed up, with llama.cpp's own defaults.
    """
    params = xllamacpp.CommonParams()
    params.model.path = wanted["path"]
    params.hostnames = [LOOPBACK]
    params.n_ctx = params.n_batch = params.n_ubatch = wanted["context"]
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = wanted["threads"]
    params.fit_params = False  # use these sizes instead of searching for ones that fit a device
    params.cache_ram_mib = 0
    params.warmup = not wanted["states"]
    params.verbosity = ERRORS
    if wanted["states"]:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return params


def end_with_parent() -> None:
    """End this process once standard input is closed: by the parent, or by the system after the parent's death."""
    while os.read(STDIN, 1):
        pass
    os._exit(0)  # at once: llama.cpp's own ending may hang, and there is nothing to save


def main() -> None:
    """Start the server, tell its address, and serve until the parent has gone."""
    if sys.platform == "linux":  # while llama.cpp reads a file no thread of Python runs that could notice
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    wanted = json.loads(sys.stdin.buffer.readline())
    watcher = threading.Thread(target=end_with_parent, name="parent", daemon=True)
    watcher.start()
    started = time.monotonic()
    try:
        server = xllamacpp.Server(server_settings(wanted))
    except RuntimeError:  # why is on standard error already
        os._exit(REFUSED)
    sys.stdout.write(f"{server.listening_address} {time.monotonic() - started}\n")
    sys.stdout.flush()
    watcher.join()


if __name__ == "__main__":
    main()
