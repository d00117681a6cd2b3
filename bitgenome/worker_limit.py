"""workers.json: how many workers a running search may hold, told from outside while it runs."""

import json
import logging
from pathlib import Path

from search.files import atomic_write_json

log = logging.getLogger(__name__)

LIMIT_FILE = "workers.json"


def write_limit(run: Path, most: int) -> None:
    """Let the run at ``run`` hold at most ``most`` workers from now on. Raises ValueError unless it is at least 1."""
    if most < 1:
        raise ValueError(f"expected at least 1 worker, found {most}")
    atomic_write_json(run / LIMIT_FILE, {"most": most})


def read_limit(run: Path) -> int | None:
    """The most workers that the run at ``run`` may hold; None if nobody said, or nothing that can be read."""
    path = run / LIMIT_FILE
    try:
        most = json.loads(path.read_text(encoding="utf-8"))["most"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning('expected {"most": workers} in %s, found %r', path, error)
        return None
    return max(1, int(most)) if isinstance(most, int) else None
