"""Puts a run's report together, and writes it."""

import logging
from pathlib import Path

from bitgenome.common import layout
from bitgenome.common.errors import UserError, expecting
from bitgenome.common.files import atomic_write_text
from bitgenome.report.course import convergence, cost, healing
from bitgenome.report.gains import gains
from bitgenome.report.headline import figures_people_quote, provenance, sample, simple_mixes, state, tiles
from bitgenome.report.levels import cost_map, type_map, types_by_kind
from bitgenome.report.names import megabytes
from bitgenome.report.page import Page, render
from bitgenome.report.quality import agreement, at_this_size, front
from bitgenome.report.source import RunSource, RunView
from workers.storage.folders import is_url, open_folder

log = logging.getLogger(__name__)

SECTIONS = (
    front, at_this_size, simple_mixes, type_map, cost_map, types_by_kind, convergence, agreement, healing,
    figures_people_quote, cost, provenance,
)  # fmt: skip


def page_of(view: RunView) -> Page:
    """Return the page of a run; sections of which the run holds nothing are left out."""
    doing, progress = state(view)
    budget = view.best.get("budget_bytes") or view.status.budget_bytes
    within = f" within {megabytes(budget)}".replace(" MB", "\u00a0MB") if budget else ""
    strategy = view.config.get("search", {}).get("strategy", "")
    file = view.best.get("gguf")
    return Page(
        title=f"{view.model}{within}",
        subtitle=f"Run {view.status.name}{f', {strategy} search' if strategy else ''}",
        sections=[section for make in SECTIONS if (section := make(view))],
        tiles=tiles(view),
        says=[*gains(view), *sample(view)],
        commands=[f"llama-server -m {file}", f"llama-cli -m {file}"] if file else [],
        state=doing,
        progress=progress,
    )


def page_from(source: RunSource, finished: bool = False) -> Page:
    """Return the page of what a run's files hold now; see RunSource.read. Raises UserError if they are damaged."""
    view = source.read(finished)
    remedy = f"bitgenome resume {source.location} writes them again"
    with expecting("the figures of a run", f"{source.location}/{layout.BEST}", remedy):
        return page_of(view)


def try_report(location: str | Path) -> None:
    """Write the report of a finished run; that it cannot be written is a warning, and no reason to fail."""
    try:
        write_report(location, finished=True)
    except UserError as error:
        log.warning("no report of %s was written: %s", location, error)


def write_report(location: str | Path, finished: bool = False) -> str:
    """Write the report of the run at a path or URL into its directory, and return where it lies.

    ``finished``: the caller is the run's driver, and everything else is written. Raises UserError if there is no run or
    its files are damaged, and StorageError if the report cannot be written.
    """
    source = RunSource(location)
    html = render(page_from(source, finished))
    if is_url(source.location):
        open_folder(source.location).write(layout.REPORT, html.encode())
    else:
        atomic_write_text(Path(source.location) / layout.REPORT, html)
    return f"{source.location}/{layout.REPORT}"
