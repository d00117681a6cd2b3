"""Words of the closing table: names of genomes explained, and what the search has added, certain or not."""

from collections.abc import Iterable

from search.loop.winner import Winner

CERTAIN = 2.0  # standard errors beyond which a difference is one
FILLED = "uniform, filled"  # shown for the seed "uniform", which is none of the pure levels
LEGEND = {  # first words of a name -> what it is; in the order in which they are told
    "searched": "the genome that ships, chosen on validation text",
    "healed": "the same file with norms and biases tuned",
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


def legend(names: Iterable[str]) -> list[str]:
    """Return lines that explain the shown ``names``, each word once, and none that is not there."""
    parts = [part for name in names for part in name.split(" = ")]
    levels = [part for part in parts if part != FILLED]
    shown = {part.partition(" ")[0] for part in levels} | {part for part in parts if part == FILLED}
    lines = [f"{word}: {meaning}" for word, meaning in LEGEND.items() if word in shown]
    measures = {part.partition(" ")[2] for part in levels if not part.startswith("uniform")}
    return lines + [f"{word}: {meaning}" for word, meaning in MEASURES.items() if word in measures]


def lead_on_validation(winner: Winner) -> str:
    """Return a sentence on what the search has added to the best genome made without it, and how certain that is.

    A lead counts as one beyond CERTAIN standard errors of the paired difference.
    """
    reference, lead = plain(winner.reference), winner.lead
    if lead is None:
        found = f"no genome that was tried beats {reference} on validation text: it ships, the search added nothing"
    else:
        size = f"{abs(lead.mean):.5f} ± {lead.standard_error:.5f} KL"
        where = f"on validation text (paired, {lead.windows} window{'s' if lead.windows > 1 else ''})"
        if abs(lead.mean) > CERTAIN * lead.standard_error:
            found = f"searched {'beats' if lead.mean < 0 else 'trails'} {reference} by {size} {where}"
        else:
            found = f"no difference beyond noise between searched and {reference}: {size} {where}"
    if not winner.ties:
        return found
    others = "1 other finalist is" if winner.ties == 1 else f"{winner.ties} other finalists are"
    return f"{found}; {others} within one standard error"
