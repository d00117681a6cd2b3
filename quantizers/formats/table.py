"""This module holds the table of GGUF weight formats: block geometry, exact sizes and which row lengths fit.

A level (W2 ... W8, or a codebook type's name) is what the search chooses; the table maps it to a GGUF type. Sizes are
those of the gguf package.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

SUPER_BLOCK = 256  # columns of a K type's super-block (QK_K in ggml-common.h)
GGUF_ALIGNMENT = 32  # bytes; GGUF pads every tensor's data to this


@dataclass(frozen=True)
class QuantFormat:
    """A GGUF tensor type stores ``block_size`` consecutive weights of a row in ``block_bytes`` bytes."""

    name: str  # of the GGUF type, e.g. "Q2_K"
    level: str  # of the search, e.g. "W2"
    block_size: int
    block_bytes: int

    @property
    def ggml_type(self) -> GGMLQuantizationType:
        """The type's member of gguf's enumeration."""
        return GGMLQuantizationType[self.name]

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.block_bytes / self.block_size

    @property
    def is_float(self) -> bool:
        """Whether weights are stored as floats, without blocks (F16, F32)."""
        return self.block_size == 1

    def fits(self, columns: int) -> bool:
        """Return whether rows of ``columns`` weights divide into whole blocks."""
        return columns % self.block_size == 0

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row of ``columns`` weights. Raises ValueError if it does not divide into blocks."""
        if not self.fits(columns):
            raise ValueError(f"row size ({columns}) is not a multiple of {self.name} block size ({self.block_size})")
        return columns // self.block_size * self.block_bytes

    def tensor_bytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of a tensor of ``shape`` (..., columns), without the padding that GGUF adds behind it.

        Raises ValueError if rows do not divide into blocks.
        """
        return prod(shape[:-1]) * self.row_bytes(shape[-1])


def _format(name: str, level: str) -> QuantFormat:
    return QuantFormat(name, level, *GGML_QUANT_SIZES[GGMLQuantizationType[name]])


# Types whose weights come from tables; their levels are named like the types.
CODEBOOK_TYPES = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "IQ4_NL")
FORMATS: dict[str, QuantFormat] = {
    f.name: f
    for f in (
        _format("Q2_K", "W2"),
        _format("Q3_K", "W3"),
        _format("Q4_K", "W4"),
        _format("Q5_K", "W5"),
        _format("Q6_K", "W6"),
        _format("Q8_0", "W8"),
        _format("Q4_0", "W4"),
        _format("Q4_1", "W4"),
        _format("Q5_0", "W5"),
        _format("Q5_1", "W5"),
        *(_format(name, name) for name in CODEBOOK_TYPES),
        _format("F16", "W16"),
        _format("F32", "W32"),
    )
}
K_LEVELS = {"W2": "Q2_K", "W3": "Q3_K", "W4": "Q4_K", "W5": "Q5_K", "W6": "Q6_K", "W8": "Q8_0"}
LEVEL_FORMATS = K_LEVELS | {"W16": "F16"} | {name: name for name in CODEBOOK_TYPES}
# Names for sets of levels.
LEVEL_PRESETS = {"classic": ("W2", "W4", "W8"), "fine": tuple(K_LEVELS), "all": (*K_LEVELS, *CODEBOOK_TYPES)}
# The types that llama.cpp falls back to where a row does not divide into 256 (llama-quant.cpp, tensor type fallback).
ROW_FALLBACK = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "Q8_0": "Q8_0",
    "F16": "F16",
} | dict.fromkeys(CODEBOOK_TYPES, "IQ4_NL")


def level_named(name: str) -> str:
    """Return the level that ``name`` is, or whose GGUF type it is, in any case: W4 for w4 and q4_k.

    Raises ValueError for another name.
    """
    for level, kind in LEVEL_FORMATS.items():
        if name.upper() in (level, kind):
            return level
    both = (f"{level} ({kind})" if level != kind else level for level, kind in LEVEL_FORMATS.items())
    raise ValueError(f"expected levels among {', '.join(both)}, found {name}")


def format_for(level: str, columns: int) -> QuantFormat:
    """Return the format of ``level`` for rows of ``columns`` weights.

    Where the format's blocks do not fit, the result is llama.cpp's fallback type, or F16 if its blocks do not fit
    either. Raises ValueError for a level that is not in the table.
    """
    if level not in LEVEL_FORMATS:
        raise ValueError(f"unknown level {level!r}: expected one of {', '.join(LEVEL_FORMATS)}")
    wanted = FORMATS[LEVEL_FORMATS[level]]
    for candidate in (wanted, FORMATS[ROW_FALLBACK[wanted.name]]):
        if candidate.fits(columns):
            return candidate
    return FORMATS["F16"]


def legal_formats(levels: Sequence[str], columns: int) -> tuple[QuantFormat, ...]:
    """Return the distinct formats of ``levels`` for rows of ``columns`` weights, smallest first.

    Raises ValueError for a level that is not in the table.
    """
    formats = {format_for(level, columns) for level in levels}
    return tuple(sorted(formats, key=lambda f: (f.bits_per_weight, f.name)))


def padded(size: int) -> int:
    """Return ``size`` in bytes, rounded up to a multiple of GGUF's alignment."""
    return -(-size // GGUF_ALIGNMENT) * GGUF_ALIGNMENT
