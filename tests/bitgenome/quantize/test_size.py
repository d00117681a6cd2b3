"""A size is what was asked for: bytes, bits, a mix of llama.cpp's, or what a device has room for."""

import re
from pathlib import Path

import pytest

from bitgenome.common.errors import UserError
from bitgenome.plan.plan import free_space
from bitgenome.quantize.size import Device, WantedSize, size_in_bytes, wanted_budget
from evaluators.model.folder import ModelFolder
from exporters.files.built_layout import BuiltLayout
from exporters.files.file_layout import FileLayout
from quantizers.formats.table import LEVEL_PRESETS
from search.types import SearchSpace
from tests.conftest import EMBEDDED

# bytes of llama-quantize's own files of the embedded model, made without an importance matrix
LLAMA_QUANTIZE = {
    "Q2_K": 2745056, "q3_k_m": 3287776, "Q3_K_L": 3500768, "IQ4_XS": 3523808, "Q4_K_S": 3687648, "Q4_K": 3789536,
    "Q5_K_M": 4322016, "Q6_K": 4887776, "Q8_0": 6284512,
}  # fmt: skip


@pytest.fixture(scope="module")
def embedded() -> tuple[SearchSpace, FileLayout]:
    folder = ModelFolder(EMBEDDED)
    file = BuiltLayout(folder)
    return free_space(file, folder, LEVEL_PRESETS["all"]), file


@pytest.mark.parametrize(("text", "size"), [("4.5GB", 4_500_000_000), ("4.5 GiB", 4831838208), ("123456", 123456)])
def test_gb_are_decimal_and_gib_binary(text: str, size: int) -> None:
    assert size_in_bytes(text, "--size") == size


@pytest.mark.parametrize("text", ["4.5", "4.5G", "4.5 gigabytes", "-1GB", "4,5GB", "GB", "", "1e9"])
def test_a_size_that_could_be_two_things_is_none(text: str) -> None:
    with pytest.raises(UserError, match="expected a size such as 4.5GB or 4GiB for --size, found "):
        WantedSize(size=text).check()


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (WantedSize(), "expected one size, by .*, found none"),
        (WantedSize(size="1GB", like="Q4_K_M"), "expected one size, by .*, found 2"),
        (WantedSize(device=Device("16GiB", 1024, kv="q3")), "expected --kv among f32, .*, found q3"),
        (WantedSize(device=Device("16GiB", 1024, mmproj=Path("none.gguf"))), "for --mmproj, found none at none.gguf"),
        (WantedSize(device=Device("16", 1024, margin="1.5")), "for --margin, found '1.5'"),
    ],
)
def test_sizes_that_say_too_little_or_too_much_are_one_sentence(wanted: WantedSize, said: str) -> None:
    with pytest.raises(UserError, match=said):
        wanted.check()


@pytest.mark.parametrize("mix", LLAMA_QUANTIZE)
def test_like_a_mix_is_the_size_of_llama_quantizes_file(embedded: tuple[SearchSpace, FileLayout], mix: str) -> None:
    budget = wanted_budget(WantedSize(like=mix), *embedded).budget
    assert budget == {"file_size": LLAMA_QUANTIZE[mix]}


def test_a_device_is_filled_to_what_llamacpp_needs_there(embedded: tuple[SearchSpace, FileLayout]) -> None:
    space, file = embedded

    def sized(memory: str, context: int, kv: str = "f16") -> tuple[int, str]:
        found = wanted_budget(WantedSize(device=Device(memory, context, kv, margin="0")), space, file)
        return found.budget["file_size"], found.note

    size, note = sized("46MB", 8192)
    parts = [float(part) for part in re.findall(r"([\d.]+) MB", note)]  # the file, cache, buffers, margin
    assert sum(parts) == pytest.approx(46, abs=0.002) and size == pytest.approx(parts[0] * 1e6, abs=1000)
    assert sized("46MB", 7936)[0] > size  # fewer keys and values leave more room
    largest, note = sized("46MB", 8192, "q8_0")
    assert largest == space.file_bytes(space.largest()) and "the largest of this model's files" in note
    with pytest.raises(UserError, match=r"expected room for a file of at least [\d.]+ MB on a device of 30MB, found 0"):
        sized("30MB", 8192)


def test_a_mix_below_the_smallest_file_is_refused(embedded: tuple[SearchSpace, FileLayout]) -> None:
    _, file = embedded
    coarse = free_space(file, ModelFolder(EMBEDDED), ("W8",))
    with pytest.raises(UserError, match=r"expected a mix of at least [\d,]+ bytes, .* found Q4_K_M"):
        wanted_budget(WantedSize(like="Q4_K_M"), coarse, file)
    with pytest.raises(UserError, match="expected one of llama.cpp's mixes .* found Q9_K for --like"):
        wanted_budget(WantedSize(like="Q9_K"), coarse, file)
