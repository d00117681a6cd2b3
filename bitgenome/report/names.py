"""Turns the short names of runs into words that a reader of a report knows, and numbers into text."""

from collections.abc import Iterable

from bitgenome.common.numbers import perplexity_text
from quantizers.formats.table import FORMATS

CLEAR = 2.0  # standard errors beyond which a difference is one
FILLED = "uniform, filled"  # shown for the seed "uniform", which is none of the pure levels
NAMES = {  # first words of the closing table's names, see search.allocation.seeds; in the order in which they are told
    "searched": "the genome that ships, chosen on validation text",
    "healed": "the same file as tuned after the search, for no bytes",
    "exact": "the optimum by the tensors' sensitivities alone, without a search",
    "lagrangian": "near that optimum: the largest gains per byte, by a price for bytes",
    "greedy": "one tensor at a time, the largest gain per byte first",
    FILLED: "the largest level that fits, the rest of the budget by gain per byte",
    "uniform": "every tensor at that level, whatever the budget",
}
MEASURES = {
    "kl": "sensitivities measured as KL",
    "gradient": "sensitivities by one backward pass",
    "around_base": "sensitivities measured as KL around a uniform genome",
    "reconstruction": "sensitivities by each tensor's output error, without text",
    "relative": "the same, relative to the output's power",
    "logit_mse": "sensitivities by the change of logits",
}


def plain(name: str) -> str:
    """Return the name of a genome, or of several joined by " = ", as it is shown."""
    return " = ".join(FILLED if part == "uniform" else part for part in name.split(" = "))


def legend(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return the words of the shown ``names``, each once with what it means, and none that is not there."""
    parts = [part for name in names for part in name.split(" = ")]
    levels = [part for part in parts if part != FILLED]
    shown = {part.partition(" ")[0] for part in levels} | {part for part in parts if part == FILLED}
    measures = {part.partition(" ")[2] for part in levels if not part.startswith("uniform")}
    words = [(word, meaning) for word, meaning in NAMES.items() if word in shown]
    return words + [(word, meaning) for word, meaning in MEASURES.items() if word in measures]


def megabytes(size: int) -> str:
    """Return a size in bytes as text in MB (10^6 bytes), from 10,000 MB on in GB (10^9 bytes)."""
    return f"{size / 1e6:,.3f} MB" if size < 1e10 else f"{size / 1e9:,.3f} GB"


def kl_text(kl: float) -> str:
    """Return a KL in nats per token as text with five decimals, or more where it is small."""
    return f"{kl:.5f}" if abs(kl) >= 0.001 or kl == 0 else f"{kl:.2e}"


def figures_text(kl: float | None, perplexity: float | None) -> tuple[str, str]:
    """Return a KL and a perplexity as cells of a table; empty where they are not known."""
    return "" if kl is None else kl_text(kl), "" if perplexity is None else perplexity_text(perplexity)


def duration(seconds: float) -> str:
    """Return seconds as text such as 40 s, 12 min or 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def bits_of(type_name: str) -> float | None:
    """Return the bits per weight of a GGUF type, None for one that is not searched."""
    found = FORMATS.get(type_name)
    return found.bits_per_weight if found else None


def level_of(names: str) -> str | None:
    """Return the level that all tensors have in a row of the closing table ("uniform W4": W4), None in another row."""
    return next((part.partition(" ")[2] for part in names.split(" = ") if part.startswith("uniform ")), None)


def is_ours(names: str) -> bool:
    """Return whether a row of the closing table is what the run searched, or what healing made of it."""
    return bool({"searched", "healed"} & set(names.split(" = ")))
