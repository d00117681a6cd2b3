"""A damaged file ends in one sentence, never in llama.cpp."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.float_gguf import export_float
from evaluators.model.folder import ModelFolder
from exporters.files.gguf_reader import read_gguf
from exporters.runtime.comparison import measure_file
from exporters.runtime.llamacpp import LlamaCppError, LlamaCppRuntime
from exporters.runtime.text import generation_speed


@pytest.fixture(scope="module")
def sound(small_model: Callable[..., ModelFolder], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "m.gguf"
    export_float(small_model("qwen2"), path)
    return path.read_bytes()


TOKENS = b"tokenizer.ggml.tokens\t\0\0\0"
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "found 0 bytes"),
    "not-gguf": (lambda _: b"PK\3\4" + bytes(100), r"first bytes b'PK\\x03\\x04'"),
    "old-version": (lambda b: b[:4] + struct.pack("<I", 1) + b[8:], "GGUF version 1 instead of 3"),
    "header-cut": (lambda b: b[:3000], "an end at byte 3000 inside its header"),
    "data-cut": (lambda b: b[:-40000], "it is truncated"),
    "last-byte-cut": (lambda b: b[:-1], "it is truncated"),
    "endless-array": (
        lambda b: b.replace(TOKENS + b"\10\0\0\0\0\2\0\0", TOKENS + b"\10\0\0\0\xff\xff\xff\xff"),
        "expected a complete GGUF file",
    ),
    "unknown-type": (lambda b: b.replace(b"general.name\10", b"general.name\77"), "unknown value type 63"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_one_sentence(damage: str, sound: bytes, tmp_path: Path) -> None:
    change, message = DAMAGE[damage]
    path = tmp_path / "m.gguf"
    path.write_bytes(change(sound))
    assert path.read_bytes() != sound
    windows = np.zeros((1, 4), dtype=np.int64)
    for use in (read_gguf, generation_speed, lambda p: measure_file(p, windows)):
        with pytest.raises(ValueError, match=message):
            use(path)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a GGUF file, found none at"):
        LlamaCppRuntime(tmp_path / "none.gguf", 8)


def test_every_truncation_is_found(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for length in np.random.default_rng(0).integers(0, len(sound), 60):
        path.write_bytes(sound[:length])
        with pytest.raises(ValueError, match=r"^expected a"):
            read_gguf(path)


def test_any_changed_byte_of_the_header_is_a_sentence_or_still_a_file(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    rng = np.random.default_rng(0)
    refused = 0
    for position, value in zip(rng.integers(0, 12000, 300), rng.integers(0, 256, 300), strict=True):
        path.write_bytes(sound[:position] + bytes([value]) + sound[position + 1 :])
        try:
            read_gguf(path)
        except ValueError as error:
            assert str(error).startswith("expected a complete GGUF file")
            refused += 1
    assert refused > 10


def test_a_sound_file_that_llamacpp_refuses_is_an_error_of_its_own(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(sound.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    read_gguf(path)
    with pytest.raises(LlamaCppError, match="cannot load"), LlamaCppRuntime(path, 8):
        pass
