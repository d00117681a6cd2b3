"""Finds the processes of a batch's runs again after the batch was killed."""

import logging
from collections.abc import Sequence
from pathlib import Path

import psutil

from bitgenome.common import layout

log = logging.getLogger(__name__)

CHILD = "bitgenome.cli.child"  # the module that runs are started as
GRACE_S = 30.0  # seconds that a run has for its checkpoint once its batch is gone


def wait_for_orphans(path: Path) -> None:
    """Wait for runs of this batch whose batch process was killed; they end by themselves.

    ``path`` is the batch's directory. The wait ends after 2 GRACE_S seconds at most.
    """
    found = [process for process in psutil.process_iter(["cmdline"]) if is_child(process.info["cmdline"] or [], path)]
    if found:
        log.info("waiting for %d runs of a batch that was killed to end", len(found))
        psutil.wait_procs(found, timeout=2 * GRACE_S)


def is_child(command: Sequence[str], path: Path) -> bool:
    """Return whether a command line is that of a run of the batch at ``path``."""
    return CHILD in command and str((path / layout.CONFIGS).absolute()) in {str(Path(part).parent) for part in command}
