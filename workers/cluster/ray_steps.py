"""How far the tasks of a Ray cluster's workers are, through the cluster's key-value store.

An actor answers no calls while it works, so each writes the last step that its task told under a key of its own.
"""

import json
import time
from contextlib import suppress
from dataclasses import asdict

from ray.experimental import internal_kv

from bitgenome.common.steps import Step

NAMESPACE = b"bitgenome"
WRITE_EVERY_S = 2.0


class StepWriter:
    """Writes the steps of a worker's tasks under ``key``: of a task the first, then one in WRITE_EVERY_S seconds."""

    def __init__(self, key: str):
        self._key = key.encode()
        self._next, self._label = 0.0, ""

    def __call__(self, label: str, step: Step) -> None:
        """Write the last step of the task with this ``label``, if it is time."""
        if (now := time.monotonic()) < self._next and label == self._label:
            return
        self._next, self._label = now + WRITE_EVERY_S, label
        record = {"label": label, **asdict(step)}
        with suppress(Exception):  # how far a task is said to be must not fail it
            internal_kv._internal_kv_put(self._key, json.dumps(record).encode(), overwrite=True, namespace=NAMESPACE)


def read_step(key: str, label: str) -> Step | None:
    """Return the last step written under ``key``, if it is of the task with this ``label``."""
    with suppress(Exception):  # while the store restarts, the map goes on
        content = internal_kv._internal_kv_get(key.encode(), namespace=NAMESPACE)
        record = json.loads(content) if content else {}
        if record.pop("label", None) == label:
            return Step(**record)
    return None


def forget_steps(key: str) -> None:
    """Remove what was written under ``key``."""
    with suppress(Exception):
        internal_kv._internal_kv_del(key.encode(), namespace=NAMESPACE)
