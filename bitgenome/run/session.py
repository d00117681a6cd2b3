"""Opens the pool that a configuration asks for, from joining its cluster to leaving it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

from bitgenome.common import layout
from bitgenome.observe.logs import log_file
from bitgenome.storage.staged import StoredModel, staged_pool
from bitgenome.storage.worker_limit import WorkerLimit
from evaluators.model.folder import ModelFolder
from workers.cluster.open_pool import close_cluster, open_pool
from workers.cluster.settings import WorkerSettings
from workers.pool.base import Pool


class SessionConfig(StoredModel, Protocol):
    """Settings that a session depends on: those of a run, or of a study."""

    @property
    def name(self) -> str: ...

    @property
    def workers(self) -> WorkerSettings: ...


@contextmanager
def open_session(
    config: SessionConfig,
    folder: ModelFolder,
    directory: Path,
    opening: AbstractContextManager[None] | None = None,
) -> Iterator[Pool]:
    """Join or start the cluster of ``config``, yield its pool, and leave the cluster at the end.

    - ``folder`` is the model, brought to every node if storage or model are behind URLs.
    - ``directory`` gets events.log, and its workers.json limits the pool while it works.
    - ``opening`` is a context that is entered while the pool opens.

    Raises ClusterError (one sentence) if the cluster is missing, too small, or refuses access.
    """
    with log_file(directory / layout.EVENTS, config.name):
        try:
            with opening or nullcontext():
                pool = open_pool(config.workers, config.name)
            pool.limit = WorkerLimit(directory)
            with staged_pool(pool, config, folder) as staged:
                yield staged
        finally:
            close_cluster()
