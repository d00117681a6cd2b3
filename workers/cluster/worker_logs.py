"""Logs of workers as JSON objects, one per line, in the log files that Ray keeps of workers.

Workers log so if the driver does. Beside the message the objects carry Ray's ids, the actor's name and the task's name,
which says generation and part.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.job_config import JobConfig

LOG_JSON = "BITGENOME_LOG_JSON"  # environment variable that asks for it


def worker_logs() -> "JobConfig | None":
    """Return the job configuration for ``ray.init``; None if no JSON logs are asked for.

    The driver configures its own logging, hence no ``logging_config``.
    """
    if not os.environ.get(LOG_JSON):
        return None
    from ray import LoggingConfig  # noqa: PLC0415 - the command line reads LOG_JSON above without Ray
    from ray.job_config import JobConfig  # noqa: PLC0415

    job = JobConfig()
    job.set_py_logging_config(LoggingConfig(encoding="JSON"))
    return job
