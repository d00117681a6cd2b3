"""The processes of a batch's runs: how they are started, and how those of a batch that was killed are found again."""

import logging
from collections.abc import Sequence
from pathlib import Path

import psutil

from bitgenome.common import layout

log = logging.getLogger(__name__)

CHILD = "bitgenome.cli.child"  # the module that runs are started with
GRACE_S = 30.0  # that a run has for its checkpoint once its batch is gone


def wait_for_orphans(path: Path) -> None:
    """Wait for runs of an earlier process of this batch that was killed: they end by themselves."""
    found = [process for process in psutil.process_iter(["cmdline"]) if is_child(process.info["cmdline"] or [], path)]
    if found:
        log.info("waiting for %d runs of a batch that was killed to end", len(found))
        psutil.wait_procs(found, timeout=2 * GRACE_S)


def is_child(command: Sequence[str], path: Path) -> bool:
    """Whether a command line is that of a run of the batch at ``path``."""
    return CHILD in command and str((path / layout.CONFIGS).absolute()) in {str(Path(part).parent) for part in command}
