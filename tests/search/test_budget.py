"""Budgets: every unit comes to the same exact bytes, and what cannot be met is refused in the user's own unit."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.budget import Budget, parse_size
from tests.search.synthetic import middle_budget, transformer_space

SPACE = transformer_space(2)
SMALLEST, LARGEST = SPACE.file_bytes(SPACE.smallest()), SPACE.file_bytes(SPACE.largest())


@given(st.data())
def test_the_bits_per_weight_of_a_genome_buy_exactly_its_file(data: st.DataObject) -> None:
    genome = tuple(data.draw(st.integers(0, len(gene.formats) - 1)) for gene in SPACE.genes)
    assert Budget.from_bits_per_weight(SPACE, SPACE.bits_per_weight(genome)).file_bytes == SPACE.file_bytes(genome)


def test_a_compression_of_a_quarter_is_four_bits_per_weight() -> None:
    assert Budget.from_compression(SPACE, 0.25) == Budget.from_bits_per_weight(SPACE, 4.0)
    assert Budget.from_compression(SPACE, 0.25).file_bytes == SPACE.weights // 2


@pytest.mark.parametrize(
    ("words", "size"),
    [("3.2 MiB", 3355443), ("4.5GB", 4_500_000_000), ("2GiB", 2**31), (" 1.5 kb ", 1500), ("12345", 12345), (77, 77)],
)
def test_sizes_are_read_exactly_and_rounded_down(words: int | str, size: int) -> None:
    assert parse_size(words) == size


@pytest.mark.parametrize("words", ["", "GB", "3 parsecs", "-2 GiB", "1e9", "1,5 GB", "3.2.1 MB"])
def test_what_is_no_size_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match="is not a number of bytes"):
        parse_size(words)


@pytest.mark.parametrize("size", [SMALLEST, LARGEST])
def test_the_bounds_themselves_are_budgets(size: int) -> None:
    assert Budget.from_size(SPACE, size).file_bytes == size


@pytest.mark.parametrize("size", [SMALLEST - 1, LARGEST + 1])
def test_a_byte_beyond_the_bounds_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"{SMALLEST:,} bytes.*{LARGEST:,} bytes"):
        Budget.from_size(SPACE, size)


@pytest.mark.parametrize("asked", [0.0, 1.0, 99.0])
def test_bounds_come_in_bits_per_weight_and_are_accepted_when_asked_for(asked: float) -> None:
    with pytest.raises(ValueError, match="cannot be met") as refusal:
        Budget.from_bits_per_weight(SPACE, asked)
    low, high = re.findall(r"([\d.]+) bits per weight \([\d,]+ bytes\)", str(refusal.value))[-2:]
    assert Budget.from_bits_per_weight(SPACE, float(low)).file_bytes >= SMALLEST
    assert Budget.from_bits_per_weight(SPACE, float(high)).file_bytes <= LARGEST


def test_bounds_come_in_the_unit_of_the_size_asked_for() -> None:
    with pytest.raises(ValueError, match=r"size 9 GiB .* between 0\.\d+ GiB \([\d,]+ bytes\) and 0\.\d+ GiB"):
        Budget.from_size(SPACE, "9 GiB")
    with pytest.raises(ValueError, match=r"compression 2 .* between compression 0\.\d+ "):
        Budget.from_compression(SPACE, 2.0)


@pytest.mark.parametrize("asked", [float("nan"), float("inf")])
def test_a_budget_that_is_no_number_is_refused(asked: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        Budget.from_bits_per_weight(SPACE, asked)


def test_a_budget_between_the_bounds_is_kept_to_the_byte() -> None:
    middle = middle_budget(SPACE)
    assert Budget.from_size(SPACE, str(middle.file_bytes)) == middle
