"""Words below the closing table: what the search has added, certain or not."""

from bitgenome.report.names import CLEAR, plain
from search.loop.winner import Winner


def lead_on_validation(winner: Winner) -> str:
    """Return a sentence on what the search has added to the best genome made without it, and how certain that is.

    A lead counts as one beyond CLEAR standard errors of the paired difference.
    """
    reference, lead = plain(winner.reference), winner.lead
    if lead is None:
        found = f"no genome that was tried beats {reference} on validation text: it ships, the search added nothing"
    else:
        size = f"{abs(lead.mean):.5f} ± {lead.standard_error:.5f} KL"
        where = f"on validation text (paired, {lead.windows} window{'s' if lead.windows > 1 else ''})"
        if abs(lead.mean) > CLEAR * lead.standard_error:
            found = f"searched {'beats' if lead.mean < 0 else 'trails'} {reference} by {size} {where}"
        else:
            found = f"no difference beyond noise between searched and {reference}: {size} {where}"
    if not winner.ties:
        return found
    others = "1 other finalist is" if winner.ties == 1 else f"{winner.ties} other finalists are"
    return f"{found}; {others} within one standard error"
