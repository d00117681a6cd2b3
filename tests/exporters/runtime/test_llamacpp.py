"""llama.cpp in a process of its own: what kills it is a sentence here, and it never outlives this process."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks.float_gguf import export_float
from evaluators.model.folder import ModelFolder
from exporters.files.gguf_reader import read_gguf
from exporters.runtime.llamacpp import SERVER, LlamaCppError, LlamaCppRuntime
from exporters.runtime.text import generation_speed
from tests.conftest import REPOSITORY

ONE = np.zeros((1, 1), dtype=np.int64)
PARENT = """
import os, signal, sys, time
from exporters.runtime.llamacpp import LlamaCppRuntime
with LlamaCppRuntime(sys.argv[1], 8, threads=1) as runtime:
    print(runtime._process.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def sound(small_model: Callable[..., ModelFolder], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "m.gguf"
    export_float(small_model("llama"), path)
    return path


def with_equal_tokens(sound: Path, path: Path) -> Path:
    """A copy whose vocabulary has one token twice, on which llama.cpp aborts."""
    tokens = [str(token).encode() for token in read_gguf(sound).key_values["tokenizer.ggml.tokens"]]
    first, second = [token for token in tokens if len(token) == 2 and token.isalpha()][:2]
    stored = [len(token).to_bytes(8, "little") + token for token in (first, second)]
    path.write_bytes(sound.read_bytes().replace(stored[1], stored[0], 1))
    return path


@pytest.mark.parametrize("run", [lambda path: LlamaCppRuntime(path, 8).__enter__(), generation_speed])
def test_a_file_on_which_llamacpp_aborts_is_one_sentence(
    run: Callable[[Path], object], sound: Path, tmp_path: Path
) -> None:
    with pytest.raises(LlamaCppError, match=r"cannot load .*: it died by SIGABRT, saying: llama-vocab.cpp:\d+: GGML"):
        run(with_equal_tokens(sound, tmp_path / "equal.gguf"))


def test_a_connection_that_llamacpp_has_dropped_is_made_anew(sound: Path) -> None:
    """It drops one that is idle for 5 s, as between two windows of a large model on a busy machine."""
    with LlamaCppRuntime(sound, 8, threads=1) as runtime:
        states = runtime.hidden_states(ONE)
        assert runtime._connection is not None
        runtime._connection.sock.shutdown(socket.SHUT_RDWR)
        assert np.array_equal(runtime.hidden_states(ONE), states)


def test_a_death_between_two_requests_is_one_sentence(sound: Path) -> None:
    with LlamaCppRuntime(sound, 8, threads=1) as runtime:
        runtime.hidden_states(ONE)
        os.kill(runtime._process.pid, signal.SIGKILL)
        with pytest.raises(LlamaCppError, match="no answer to /embedding: it died by SIGKILL"):
            runtime.hidden_states(ONE)


def test_the_process_ends_with_the_context(sound: Path) -> None:
    with LlamaCppRuntime(sound, 8, threads=1) as runtime:
        process = psutil.Process(runtime._process.pid)
    assert not process.is_running()


def test_the_process_ends_with_its_parent(sound: Path) -> None:
    parents = {signum: started(sound) for signum in (signal.SIGKILL, signal.SIGINT)}
    children = [child_of(parent) for parent in parents.values()]
    parents[signal.SIGKILL].kill()
    os.killpg(parents[signal.SIGINT].pid, signal.SIGINT)  # Ctrl-C reaches the whole group
    for parent in parents.values():
        parent.wait()
    psutil.wait_procs(children, timeout=10)
    assert not [child for child in children if child.is_running()]


def started(sound: Path) -> "subprocess.Popen[str]":
    """A process that runs ``sound`` in llama.cpp and tells its child's number."""
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, str(sound)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=REPOSITORY, start_new_session=True,
    )  # fmt: skip


def child_of(parent: "subprocess.Popen[str]") -> psutil.Process:
    assert parent.stdout is not None
    return psutil.Process(int(parent.stdout.readline()))


def test_the_server_imports_nothing_heavy(sound: Path) -> None:
    started = time.perf_counter()
    listing = subprocess.run(
        [sys.executable, "-P", "-X", "importtime", str(SERVER)], input=b"", capture_output=True, check=False
    ).stderr.decode()
    assert not {"torch", "transformers", "numpy", "bitgenome"} & {
        line.rpartition("|")[2].strip() for line in listing.splitlines()
    }
    assert time.perf_counter() - started < 10
