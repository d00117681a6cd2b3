"""How far the tasks of a Ray cluster's workers are, through the cluster's key-value store.

An actor answers no calls while it works, so each writes the last step that its task told under a key of its own.
"""

import json
import time
from dataclasses import asdict

from ray.experimental import internal_kv

from bitgenome.common.steps import Step

NAMESPACE = b"bitgenome"
WRITE_EVERY_S = 2.0


class StepWriter:
    """Writes the steps of a worker's tasks under ``key``, at most every WRITE_EVERY_S seconds."""

    def __init__(self, key: str):
        self._key = key.encode()
        self._next = 0.0

    def __call__(self, label: str, step: Step) -> None:
        """Write the last step of the task with this ``label``, if it is time."""
        if (now := time.monotonic()) < self._next:
            return
        self._next = now + WRITE_EVERY_S
        record = {"label": label, **asdict(step)}
        internal_kv._internal_kv_put(self._key, json.dumps(record).encode(), overwrite=True, namespace=NAMESPACE)


def read_step(key: str, label: str) -> Step | None:
    """Return the last step written under ``key``, if it is of the task with this ``label``."""
    content = internal_kv._internal_kv_get(key.encode(), namespace=NAMESPACE)
    record = json.loads(content) if content else {}
    return Step(record["done"], record["total"], record["unit"]) if record.pop("label", None) == label else None


def forget_steps(key: str) -> None:
    """Remove what was written under ``key``."""
    internal_kv._internal_kv_del(key.encode(), namespace=NAMESPACE)
