"""A driver whose one task logs in its worker: python -m tests.workers.cluster.logged_task ADDRESS RUN."""

import logging
import sys
from dataclasses import dataclass
from typing import Any

from workers.cluster.open_pool import close_cluster, open_pool
from workers.cluster.settings import WorkerSettings


@dataclass(frozen=True)
class Say:
    message: str
    label: str = "eval[g7 search 1/1]"

    def run(self, state: dict[Any, Any]) -> None:
        logging.getLogger("evaluators.test").warning(self.message)


if __name__ == "__main__":
    address, run = sys.argv[1:]
    with open_pool(WorkerSettings(ray=address, count=1), run) as pool:
        list(pool.map([Say("said by a worker")]))
    close_cluster()
