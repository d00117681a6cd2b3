"""The rows of the table: model types that llama.cpp's converter and transformers both know, each made small.

Every case is the type's own configuration with the settings of COMMON that it has, and its own: sizes that K types fit
(rows of 256), grouped heads, windows that the text exceeds, and each kind of layer that the type mixes.
"""

from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

TYPES = Path(__file__).with_name("types.yaml")
COMMON: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "sliding_window": 32,
}


class Case(BaseModel):
    """One row of the table: a model type, and how its small model is made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: str
    variant: str = ""
    settings: dict[str, Any] = {}
    published: dict[str, Any] = {}  # what published config.json files have and transformers' class no longer writes
    architecture: str = ""  # in those files, where transformers' class is named otherwise
    tokenizer: Literal["byte level", "sentencepiece", "plain sentencepiece"] = "byte level"  # plain: no space before
    added: tuple[str, ...] = ()  # special tokens that the converter asks for
    options: tuple[str, ...] = ()  # of the converter
    damped: str = ""  # regular expression of the parameters that are made small, see made.py
    bits: float = 5.0  # per weight of the file that a run is asked for: a small model can have much that is no gene
    note: str = ""
    required: bool = False

    @property
    def name(self) -> str:
        """The name of the row and of its files."""
        return f"{self.type}-{self.variant}" if self.variant else self.type


@cache
def cases() -> dict[str, Case]:
    """Return all rows by name, the required types first."""
    table = yaml.safe_load(TYPES.read_text(encoding="utf-8"))
    found = [Case(**row, required=part == "required") for part in ("required", "further") for row in table[part]]
    return {case.name: case for case in found}
