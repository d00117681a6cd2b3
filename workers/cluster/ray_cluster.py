"""Functions that join or start a Ray cluster, and find out how many workers there is room for."""

import logging
import os
import signal
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import ray
from ray.exceptions import RayError

from bitgenome.common.cpus import usable_cpus
from workers.cluster.worker_logs import worker_logs
from workers.errors import ClusterError


def connect(address: str) -> None:
    """Join the Ray cluster at ``address``, or start one on this machine for "local".

    ``workers.cluster.access`` has made sure before that it is there and lets this user in. Raises ClusterError if Ray
    cannot join or start it.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    handler = signal.getsignal(signal.SIGTERM)
    own = {"num_cpus": usable_cpus(), "include_dashboard": True, "dashboard_host": "127.0.0.1"}  # Ray ignores affinity
    local = own if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, job_config=worker_logs(), **local)
    except (ConnectionError, RayError, RuntimeError) as error:
        raise ClusterError(f"expected a Ray cluster at {address}, found {error}") from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # ray.init installs one of its own


@dataclass(frozen=True)
class Placement:
    """A placement says what one worker takes of a node."""

    cpus: float = 1
    gpus: float = 0
    resources: Mapping[str, float] = field(default_factory=dict)

    def amounts(self) -> dict[str, float]:
        """Return the amounts by Ray's names, without those that a worker does not need."""
        return {name: n for name, n in {"CPU": self.cpus, "GPU": self.gpus, **self.resources}.items() if n}

    def options(self) -> dict[str, object]:
        """Return the same amounts as options of a Ray actor."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "resources": dict(self.resources)}

    def room(self, nodes: Iterable[Mapping[str, float]]) -> int | None:
        """Return how many workers fit on ``nodes``, whether or not these are in use; None if a worker takes nothing.

        ``nodes`` are amounts by Ray's names.
        """
        amounts = self.amounts()
        if not amounts:
            return None
        return sum(min(int((node.get(name, 0) + 1e-9) // each) for name, each in amounts.items()) for node in nodes)

    def __str__(self) -> str:
        return " and ".join(f"{n:g} {name}" for name, n in self.amounts().items()) or "nothing"


def nodes() -> list[dict[str, float]]:
    """Return the resources of the nodes that are alive, by Ray's names."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def check_own_node() -> None:
    """Raise ClusterError if the node that this driver is connected through is gone: nothing can be started then."""
    own = ray.get_runtime_context().get_node_id()
    if not any(node["NodeID"] == own and node["Alive"] for node in ray.nodes()):
        raise ClusterError(
            "expected the Ray node that this driver is connected through to live, found it gone: continue from another"
        )


def has_accelerators() -> bool:
    """Return whether any node that is alive has a GPU."""
    return any(node.get("GPU") for node in nodes())


def check_room(placement: Placement, workers: int) -> None:
    """Raise ClusterError, with what there is and what would help, unless so many workers fit on the cluster."""
    there = nodes()
    room = placement.room(there)
    if room is None or room >= workers:
        return
    found = ", ".join(f"{sum(node.get(name, 0) for node in there):g} {name}" for name in placement.amounts())
    if room:
        remedy = f"set workers.count or workers.min to at most {room}"
    else:
        remedy = f"lower what a worker needs, or add a node with {placement}"
    raise ClusterError(
        f"expected room for {workers} workers of {placement} each, found {found} on {len(there)} nodes, which hold "
        f"{room}: {remedy}"
    )
