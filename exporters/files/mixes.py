"""The types that llama.cpp's own mixes (Q4_K_M, IQ3_XS, ...) give each tensor, and how large their files are.

The rules are those of ``llama_tensor_get_type`` in src/llama-quant.cpp of llama.cpp 0.5.0, with an importance matrix.
They go by a tensor's name, its place among the blocks, and a few numbers of the model. Shapes: (..., rows, columns).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Self

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from exporters.files.file_layout import stored_bytes
from quantizers.formats.table import padded

# Mix -> the type of tensors without a rule (llama_ftype_get_default_type), smallest files first.
DEFAULTS = {
    "IQ1_S": "IQ1_S", "IQ1_M": "IQ1_M", "IQ2_XXS": "IQ2_XXS", "IQ2_XS": "IQ2_XS", "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S",
    "Q2_K_S": "Q2_K", "Q2_K": "Q2_K", "IQ3_XXS": "IQ3_XXS", "IQ3_XS": "IQ3_S", "IQ3_S": "IQ3_S", "IQ3_M": "IQ3_S",
    "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "IQ4_XS": "IQ4_XS", "IQ4_NL": "IQ4_NL", "Q4_0": "Q4_0",
    "Q4_1": "Q4_1", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_0": "Q5_0", "Q5_1": "Q5_1", "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K", "Q6_K": "Q6_K", "Q8_0": "Q8_0",
}  # fmt: skip
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # llama-quantize's own
LEGACY = ("Q2_K_S", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL")  # older, and beaten by others of their size
VERY_SMALL = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
WIDE_GQA = 4  # query heads per key head from which attn_v gets more bits, as it is small
EIGHT = 8  # experts of the models that some rules are for
FALLBACK = {  # where a row does not divide into a type's blocks (tensor_type_fallback)
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
KEPT = (  # parts of the names of matrices that stay as they are (tensor_allows_quantization)
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "time_mix_first.weight",
    *(f"time_mix_{name}.weight" for name in ("w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")),
    "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight", "attn_rel_b.weight",
    ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger",
    "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
KEPT_NAMES = ("position_embd.weight", "token_types.weight")
OUTPUT, EMBEDDINGS = "output.weight", ("token_embd.weight", "per_layer_token_embd.weight")
CATEGORIES = (  # part of a name -> category, in llama.cpp's order
    ("attn_qkv.weight", "qkv"), ("attn_kv_b.weight", "kv_b"), ("attn_v.weight", "v"), ("attn_k.weight", "k"),
    ("attn_q.weight", "q"), ("attn_output.weight", "attn_output"), ("ffn_up", "up"), ("ffn_gate", "gate"),
    ("ffn_down", "down"),
)  # fmt: skip
VALUES = ("v", "qkv", "kv_b")  # categories that are counted as attn_v
BLOCK = re.compile(r"^blk\.(\d+)\.")
SEVENTY_B = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}  # blocks of llama.cpp's LLM_TYPE_70B
OTHER_RULES = ("glm5-next",)  # architectures with exceptions of their own, which are not here


@dataclass(frozen=True)
class MixModel:
    """Holds what llama.cpp's rules ask of a model."""

    architecture: str  # in GGUF
    blocks: int
    gqa: int  # query heads per key head, of the first block
    experts: int = 0

    @classmethod
    def of(cls, key_values: Mapping[str, Any]) -> Self:
        """Return what the key-values of a GGUF file say. Raises ValueError where they do not say it."""
        architecture = str(key_values.get("general.architecture"))

        def first(key: str, default: Any = None) -> int:
            value = key_values.get(f"{architecture}.{key}", default)
            if value is None:
                raise ValueError(f"expected {architecture}.{key} among the key-values, found none")
            return int(value[0] if isinstance(value, list) else value)

        heads = first("attention.head_count", 0)
        key_heads = first("attention.head_count_kv", heads)
        return cls(architecture, first("block_count"), heads // key_heads if key_heads else 0, first("expert_count", 0))

    @property
    def seventy_b(self) -> bool:
        """Whether llama.cpp counts the model as one of 70B."""
        return SEVENTY_B.get(self.architecture) == self.blocks and (self.architecture != "llama" or self.gqa != 1)


def mix_name(given: str) -> str:
    """Return the mix that ``given`` names, in any case. Raises ValueError for one that is not known."""
    name = ALIASES.get(given.upper(), given.upper())
    if name not in DEFAULTS:
        raise ValueError(f"expected one of llama.cpp's mixes {', '.join(DEFAULTS)}, found {given}")
    return name


def mix_types(mix: str, shapes: Mapping[str, tuple[int, ...]], model: MixModel) -> dict[str, Type]:
    """Return the type of each GGUF tensor that llama-quantize would quantize, in its order; others stay as they are.

    ``shapes`` are those of all tensors of the file, by GGUF name. Raises ValueError for a mix or an architecture whose
    rules are not here.
    """
    if model.architecture in OTHER_RULES:
        raise ValueError(f"expected an architecture whose mixes are known, found {model.architecture}")
    rules = _Rules(mix_name(mix), model, shapes)
    return {name: rules.type_of(name) for name in sorted(shapes, key=_order) if quantizes(name, shapes[name])}


def mix_bytes(
    mix: str, shapes: Mapping[str, tuple[int, ...]], model: MixModel, kept: Mapping[str, str], header: int
) -> int:
    """Return the size of the mix's file: ``header`` bytes before the data, ``kept`` the types of what stays as it is.

    llama-quantize's own file is a few hundred bytes larger: it names the importance matrix.
    """
    types = {name: Type[kept[name]] for name in shapes} | mix_types(mix, shapes, model)
    return header + sum(padded(stored_bytes(kind, shapes[name])) for name, kind in types.items())


def quantizes(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether llama-quantize quantizes the tensor ``name``; others stay as they are."""
    vector = prod(shape[:-1]) == 1
    return not (vector or not name.endswith("weight") or name in KEPT_NAMES or any(part in name for part in KEPT))


def fitting(name: str, columns: int) -> Type:
    """Return the type ``name``, or llama.cpp's fallback where it does not fit rows of ``columns`` weights."""
    for candidate in (name, FALLBACK.get(name, name)):
        if columns % GGML_QUANT_SIZES[Type[candidate]][0] == 0:
            return Type[candidate]
    return Type.F16


def _order(name: str) -> tuple[int, str]:
    """llama.cpp's order of tensors: those outside blocks, then by block, each by name."""
    found = BLOCK.match(name)
    return (int(found[1]) if found else -1, name)


class _Rules:
    """Chooses types tensor by tensor, in llama.cpp's order: some rules count the tensors of a kind so far."""

    def __init__(self, mix: str, model: MixModel, shapes: Mapping[str, tuple[int, ...]]):
        self.mix, self.model, self.shapes = mix, model, shapes
        self.tied = OUTPUT not in shapes
        self.values = sum(_category(name) in VALUES for name in shapes)
        self.seen = dict.fromkeys(("values", "down", "gate", "up"), 0)

    def type_of(self, name: str) -> Type:
        """Return the type of the next tensor."""
        columns = self.shapes[name][-1]
        return fitting(self._wanted(name, columns), columns)

    def _wanted(self, name: str, columns: int) -> str:
        mix, default = self.mix, DEFAULTS[self.mix]
        if name == OUTPUT or (self.tied and name in EMBEDDINGS):
            return self._output(default, columns)
        if name in EMBEDDINGS:
            small = {"IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}.get(mix, "Q2_K")
            return small if mix in VERY_SMALL else "IQ3_S" if mix == "IQ3_XXS" else default
        category = _category(name)
        place = self._place(name, category)
        if mix in VERY_SMALL:
            return self._very_small(category, place) or default
        if category in VALUES:
            return self._value(category, place) or default
        return self._other(category, place) or default

    def _output(self, default: str, columns: int) -> str:
        if columns % GGML_QUANT_SIZES[Type[default]][0] or self.model.architecture == "falcon" or default == "Q8_0":
            return "Q8_0"
        smallest = self.mix == "IQ3_XXS" or self.mix in VERY_SMALL
        return "Q5_K" if smallest else "Q6_K"

    def _place(self, name: str, category: str) -> int:
        """Return the number of the tensor among those of its kind, which for experts is its block."""
        kind = "values" if category in VALUES else category
        if kind not in self.seen:
            return 0
        place = self.seen[kind]
        self.seen[kind] += 1
        block = BLOCK.match(name)
        return int(block[1]) if block and self.model.experts > 1 and kind != "values" else place

    def _early(self, place: int, share: int = 8) -> bool:
        return place < self.model.blocks // share

    def _middle(self, place: int) -> bool:
        return self.model.blocks // 8 <= place < 7 * self.model.blocks // 8

    def _very_small(self, category: str, place: int) -> str | None:
        """Rules of the IQ1 and IQ2 mixes."""
        larger = self.mix in ("IQ2_S", "IQ2_M")
        eight = self.model.experts == EIGHT
        if category in VALUES:
            wide = self.model.gqa >= WIDE_GQA or self.model.experts >= WIDE_GQA
            return "Q4_K" if wide else "IQ3_S" if larger else "Q2_K"
        if category == "k" and eight:
            return "Q4_K"
        if category == "down" and self._early(place):
            return "IQ3_S" if larger else "Q2_K"
        if category == "attn_output":
            return "Q5_K" if eight else "IQ3_S" if larger else "IQ2_XXS" if self.mix in ("IQ1_S", "IQ1_M") else None
        return None

    def _value(self, category: str, place: int) -> str | None:
        """Rules of attn_v, and of what it is fused with."""
        wide = self.model.gqa >= WIDE_GQA
        more = more_bits(place, self.values)
        found = {
            "Q2_K": "Q4_K" if wide else "Q3_K",
            "Q2_K_S": "Q4_K" if wide else None,
            "IQ3_XXS": "Q4_K" if wide else "IQ3_XXS",
            "IQ3_XS": "Q4_K" if wide else None,
            "IQ3_S": "Q4_K" if wide else None,
            "IQ3_M": "Q4_K",
            "Q3_K_M": "Q5_K" if place < 2 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "IQ4_NL": "Q5_K" if wide else None,
            "IQ4_XS": "Q5_K" if wide else None,
            "Q4_K_S": "Q5_K" if place < 4 else None,
            "Q4_K_M": "Q6_K" if more else None,
            "Q5_K_M": "Q6_K" if more else None,
        }.get(self.mix)
        if self.model.seventy_b and (found or DEFAULTS[self.mix]) in ("Q3_K", "Q4_K"):
            found = "Q5_K"
        return "Q8_0" if self.model.experts == EIGHT else found

    def _other(self, category: str, place: int) -> str | None:
        """Rules of all but values, embeddings and output."""
        eight, falcon = self.model.experts == EIGHT, self.model.architecture == "falcon"
        if category == "k" and eight:
            return "Q8_0"
        if category in ("k", "q"):
            return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(self.mix)
        if category == "down":
            return self._down(place, falcon)
        if category == "attn_output":
            return self._attn_output(eight, falcon)
        middle = category in ("gate", "up") and self.mix == "IQ3_XS" and self._middle(place)
        return "IQ3_XXS" if middle else None

    def _attn_output(self, eight: bool, falcon: bool) -> str | None:
        if falcon:
            return "Q4_K" if self.mix == "Q3_K_L" else None
        if eight:
            without = ("Q2_K_S", "Q3_K_L", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0")
            return None if self.mix in without else "Q5_K"
        found = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
        return found.get(self.mix)

    def _down(self, place: int, falcon: bool) -> str | None:
        early, more = self._early(place), more_bits(place, self.model.blocks)
        first = self._early(place, 16)
        eight = self.model.experts == EIGHT
        return {
            "Q2_K": "Q3_K",
            "Q2_K_S": "Q4_K" if early else None,
            "Q3_K_M": "Q5_K" if first else "Q4_K" if not falcon or more else "Q3_K",
            "IQ3_M": "Q4_K" if early or (eight and more) else None,
            "Q3_K_L": "Q4_K" if falcon else "Q5_K",
            "Q4_K_M": ("Q6_K" if first else "Q5_K" if more else "Q4_K") if falcon else "Q6_K" if more else None,
            "Q5_K_M": "Q6_K" if more else None,
            "Q4_K_S": "Q5_K" if early and not falcon else None,
            "Q4_0": "Q4_1" if early else None,
            "Q5_0": "Q5_1" if early else None,
        }.get(self.mix)


def _category(name: str) -> str:
    return next((category for part, category in CATEGORIES if part in name), "other")


def more_bits(place: int, count: int) -> bool:
    """Return llama.cpp's ``use_more_bits``: the first and the last eighth, and every third between."""
    eighth = count // 8
    return place < eighth or place >= 7 * count // 8 or (place - eighth) % 3 == 2
