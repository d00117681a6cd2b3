"""Workers' logs as JSON objects, a line each, where the driver's are: in the log files that Ray keeps of workers.

Beside the message they carry Ray's ids, the actor's name and the task's, which says generation and part.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.job_config import JobConfig

LOG_JSON = "BITGENOME_LOG_JSON"  # environment variable that asks for it


def worker_logs() -> "JobConfig | None":
    """What ``ray.init`` is to be told; the driver's own logging is its own affair, hence no ``logging_config``."""
    if not os.environ.get(LOG_JSON):
        return None
    from ray import LoggingConfig  # noqa: PLC0415 - the command line reads LOG_JSON above without Ray
    from ray.job_config import JobConfig  # noqa: PLC0415

    job = JobConfig()
    job.set_py_logging_config(LoggingConfig(encoding="JSON"))
    return job
