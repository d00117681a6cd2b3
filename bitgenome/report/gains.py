"""Says what a run has gained; nothing is claimed that lies within the noise of the text."""

from collections.abc import Mapping, Sequence
from math import hypot
from typing import Any

import numpy as np

from bitgenome.report.names import CLEAR, is_ours, kl_text, plain
from bitgenome.report.source import RunView
from search.loop.paired import Estimate


def gains(view: RunView) -> list[str]:
    """Return a sentence on each thing that was gained, or was not, the most important first."""
    if not view.best:
        return []
    told = (against_mix(view.proof), against_uniform(view), against_simple(view.best), healed(view.healing))
    return [sentence for sentence in told if sentence]


def against_mix(proof: Mapping[str, Any]) -> str:
    """Return how the file stands beside llama.cpp's own of the nearest size, "" where that was not measured."""
    if not (mix := proof.get("mix")):
        return ""
    size = 100 * (proof["file_bytes"] / mix["file_bytes"] - 1)
    sized = f"{abs(size):.1f}\u00a0% {'larger' if size > 0 else 'smaller'}" if abs(size) >= 0.05 else "of the same size"
    ours, theirs = (one["figures"]["mean_kl"] for one in (proof, mix))
    found = [one["standard_error"] for one in (ours, theirs)]
    noise = None if None in found else hypot(*found)
    kl = compared(ours["value"], theirs["value"], noise)
    return (
        f"By llama.cpp the file has {kl} llama.cpp's own {mix['mix']} "
        f"({kl_text(ours['value'])} against {kl_text(theirs['value'])}), and is {sized}."
    )


def against_uniform(view: RunView) -> str:
    """Return how the file stands beside one type for all tensors, filled up to the same size, on test text."""
    rows = view.best["rows"]
    plain = next((row for row in rows if "uniform" in row["name"].split(" = ")), None)
    ours = next((row for row in reversed(rows) if is_ours(row["name"])), None)
    if plain is None or ours is None or plain is ours or plain["kl"] <= 0:
        return ""
    a, b = (windows_of(row, view) for row in (ours, plain))
    lead = Estimate.of(np.array(a) - np.array(b)) if len(a) == len(b) > 1 else None
    kl = compared(ours["kl"], plain["kl"], lead.standard_error if lead else None)
    error = f", ± {lead.standard_error:.5f} by window" if lead else ""
    return (
        f"On test text the file has {kl} one type for all tensors filled up to the same size "
        f"({kl_text(ours['kl'])} against {kl_text(plain['kl'])}, simulated{error})."
    )


def compared(kl: float, other: float, error: float | None) -> str:
    """Return words on how ``kl`` stands beside an ``other``, given the standard ``error`` of their difference."""
    if error is None or abs(kl - other) < CLEAR * error or other <= 0:
        return "no clear difference in KL from"
    return f"{100 * abs(1 - kl / other):.0f}\u00a0% {'less' if kl < other else 'more'} KL than"


def windows_of(row: Mapping[str, Any], view: RunView) -> Sequence[float]:
    """Return the KL of each window of test text of a row of the closing table; empty where it was not recorded."""
    if row["name"] == "healed":
        found: Sequence[float] = view.healing["test"]["after"].get("window_kl", ())
        return found
    same = (one for one in view.tested if (one.file_bytes, one.kl) == (row["file_bytes"], row["kl"]))
    return next((one.window_kl for one in same), ())


def against_simple(best: Mapping[str, Any]) -> str:
    """Return how the search stands beside the best simple mix, on validation text."""
    validation = best.get("validation") or {}
    reference, lead, error = (validation.get(key) for key in ("reference", "kl_difference", "standard_error"))
    if not reference:
        return ""
    if lead is None:
        return f"The search added nothing: the simple mix “{plain(reference)}” ships."
    told = f"{abs(lead):.5f}" + (f" ± {error:.5f}" if error is not None else "")
    mix = f"the best simple mix, “{plain(reference)}”"
    if error is None or abs(lead) <= CLEAR * error:
        return f"The searched mix has no difference beyond noise from {mix}: {told} KL on validation text (paired)."
    return (
        f"The searched mix is {'better' if lead < 0 else 'worse'} than {mix}, by {told} KL on validation text (paired)."
    )


def healed(healing: Mapping[str, Any]) -> str:
    """Return what healing gained, "" where it was not applied."""
    if not healing.get("applied") or not (after := healing["test"].get("after")):
        return ""
    before = healing["test"]["before"]["kl"]
    gain = 100 * (1 - after["kl"] / before) if before > 0 else 0.0
    if gain <= 0:
        return "Healing gained on validation text, and nothing on test text."
    return f"Healing took {gain:.0f}\u00a0% off the KL on test text, for no bytes."
