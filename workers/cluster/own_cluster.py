"""Finds out whose Ray cluster is at a port of this machine, from its processes.

Only a cluster that this user has started with ``ray start`` is taken without being named: that of another user runs
code as that user, and one that a run has started for itself ends with that run.
"""

import getpass
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from workers.errors import ClusterError

STARTED = "ray_current_cluster"  # written by ray start into the temporary directory of the cluster


@dataclass(frozen=True)
class Dashboard:
    """A process that serves a cluster's dashboard: its user, and the options of its command line."""

    user: str
    options: dict[str, str]

    @property
    def by_ray_start(self) -> bool:
        """Whether ``ray start`` has started its cluster, and no later one in the same temporary directory."""
        try:
            started = (Path(self.options["temp-dir"]) / STARTED).read_text(encoding="utf-8").strip()
        except (KeyError, OSError):
            return False
        return started == self.options.get("gcs-address")


def check_own(address: str) -> None:
    """Raise ClusterError unless the dashboard at ``address``, of this machine, is that of a cluster of this user.

    Ray takes the next free port where one is taken, so two clusters may claim the same one: then neither is taken.
    """
    port = urlsplit(address).port
    claims = [found for found in dashboards() if found.options.get("port") == str(port)]
    own = [found for found in claims if found.user == getpass.getuser()]
    if len(claims) == 1 and own and own[0].by_ray_start:
        return
    if len(claims) > 1:
        found = f"{len(claims)} that may be there"
    elif own:
        found = "one that a run has started for itself"
    else:
        found = f"that of the user {claims[0].user}" if claims else "none of yours"
    raise ClusterError(
        f"expected a cluster that you have started by ray start at {address}, found {found}: start one, or name one by "
        f"--address {address}"
    )


def own_cluster() -> str:
    """Return the address HOST:PORT of the one cluster that this user has started by ``ray start`` on this machine.

    Raises ClusterError if there is none, or more than one.
    """
    user = getpass.getuser()
    found = [d.options["gcs-address"] for d in dashboards() if d.user == user and d.by_ray_start]
    if len(found) != 1:
        raise ClusterError(
            f"expected one cluster that you have started by ray start for RAY_ADDRESS=auto, found {len(found)}: "
            "name it by its address, RAY_ADDRESS=HOST:PORT"
        )
    return found[0]


def dashboards() -> list[Dashboard]:
    """Return the dashboards on this machine whose command lines this user may see."""
    found = []
    for process in psutil.process_iter(["cmdline", "username"]):
        words = process.info["cmdline"] or []
        if any(word.endswith("dashboard/dashboard.py") for word in words[:4]):
            options = dict(word.removeprefix("--").partition("=")[::2] for word in words if word.startswith("--"))
            found.append(Dashboard(process.info["username"] or "", options))
    return found
