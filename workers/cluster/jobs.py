"""Runs as jobs of a Ray cluster, which are submitted, found, followed and stopped.

An attempt of a run is the submission ``<run>-attempt<N>``. The dashboard is asked over HTTP; a job's files and
processes are the cluster's own.
"""

import asyncio
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from workers.cluster.access import TIMEOUT_S, TOKEN_PLACES, check_protection
from workers.errors import ClusterError, JobError

CONFIG_VARIABLE = "BITGENOME_CONFIG"
ENTRYPOINT = f'printf %s "${CONFIG_VARIABLE}" | python -m bitgenome.cli run -'
ATTEMPT = "-attempt"
READ_TIMEOUT_S = 60.0  # for one answer
SILENCE_S = 20.0  # without a line of the log, after which the cluster is asked whether it is still there
END_TIMEOUT_S = 120.0  # from a stop, or from the end of a log, to the end of the job
POLL_S = 0.3

logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)


@dataclass(frozen=True)
class Submission:
    """A submission says what a cluster is asked to run.

    ``settings`` are a configuration as JSON; nothing here is a secret.
    """

    run: str
    settings: str
    metadata: Mapping[str, str]
    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, Any]:
        """``runtime_env`` with the settings in an environment variable.

        Ray replaces $NAME in variables by the cluster's own, so every $ is escaped; in JSON it can only stand inside a
        string.
        """
        variables = self.runtime_env.get("env_vars", {}) | {CONFIG_VARIABLE: self.settings.replace("$", r"\u0024")}
        return {**self.runtime_env, "env_vars": variables}


class _Client(JobSubmissionClient):
    """Gives the requests of Ray's client a timeout, which they do not have by themselves."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        return super()._do_request(method, endpoint, timeout=(TIMEOUT_S, READ_TIMEOUT_S), **options)


class Jobs:
    """Submits and follows the jobs of the cluster whose dashboard is at ``address`` (http://HOST:PORT).

    Every method raises ClusterError if the cluster is gone or refuses, and JobError if the state of the job does not
    allow the call. The constructor raises ClusterError within ``TIMEOUT_S`` seconds if nobody is there, for a missing
    or wrong token, and for an open cluster of another machine unless it is said to be ``insecure``.
    """

    def __init__(self, address: str, insecure: bool = False):
        self.address = address.rstrip("/")
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise ClusterError(f"expected the dashboard's address as http://HOST:PORT, found {address!r}")
        protected = _authentication_mode(self.address) != "disabled"
        token = check_protection(self.address, parts.hostname, protected, insecure, "give --insecure to use it anyway")
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address  # or RAY_ADDRESS would replace it
        headers = {"Authorization": f"Bearer {token}"} if token else None
        with self._asked():
            self._client = _Client(self.address, headers=headers)

    def submit(self, submission: Submission) -> str:
        """Submit a new attempt and return its id. Raises JobError if the last one has not ended."""
        attempts = self._attempts(submission.run)
        number, last = max(attempts.items(), default=(0, None))
        if last and not last.status.is_terminal():
            raise JobError(
                f"expected no running job of {submission.run}, found {last.submission_id} "
                f"({last.status.value.lower()}): follow it with bitgenome logs {submission.run} --follow"
            )
        with self._asked():
            return str(
                self._client.submit_job(
                    submission_id=f"{submission.run}{ATTEMPT}{number + 1}",
                    entrypoint=ENTRYPOINT,
                    runtime_env=submission.environment,
                    metadata=dict(submission.metadata),
                    entrypoint_num_cpus=submission.num_cpus or None,
                    entrypoint_num_gpus=submission.num_gpus or None,
                    entrypoint_resources=dict(submission.resources) or None,
                )
            )

    def find(self, run: str) -> str:
        """Return the id of the last attempt of ``run``, or ``run`` itself if it is an id. Raises JobError otherwise."""
        attempts = self._attempts(run)
        if attempts:
            return str(attempts[max(attempts)].submission_id)
        with self._asked():
            if any(job.submission_id == run for job in self._client.list_jobs()):
                return run
        raise JobError(f"expected a job of the run {run} at {self.address}, found none")

    def logs(self, job: str) -> str:
        """Return all that the job has written."""
        with self._asked():
            return str(self._client.get_job_logs(job))

    def follow(self, job: str) -> Iterator[str]:
        """Yield what the job writes, as it comes, until it ends."""
        loop = asyncio.new_event_loop()
        pieces = self._client.tail_job_logs(job)
        piece = loop.create_task(anext(pieces, None))
        try:
            while True:
                while not piece.done():
                    loop.run_until_complete(asyncio.wait({piece}, timeout=SILENCE_S))
                    self._details(job)
                with self._asked():
                    text = piece.result()
                if text is None:
                    return
                yield text
                piece = loop.create_task(anext(pieces, None))
        finally:
            piece.cancel()  # a running generator cannot be closed
            loop.run_until_complete(asyncio.wait({piece}))
            loop.run_until_complete(pieces.aclose())
            loop.close()

    def exit_code(self, job: str) -> int:
        """Wait for the end of a job whose log has ended, and return its exit code; 130 for one that was stopped."""
        details = self._end(job)
        if details.status is JobStatus.STOPPED:
            return 130
        return details.driver_exit_code if details.driver_exit_code is not None else 1

    def message(self, job: str) -> str:
        """Return what Ray says of the state of the job, in one line."""
        return " ".join((self._details(job).message or "").split())

    def stop(self, job: str) -> str:
        """Stop the job, wait for its end and return its last state. Raises JobError if it had already ended."""
        details = self._details(job)
        if details.status.is_terminal():
            raise JobError(f"expected a running job, found {job} to have {details.status.value.lower()}")
        with self._asked():
            self._client.stop_job(job)
        return str(self._end(job).status.value.lower())

    def _attempts(self, run: str) -> dict[int, JobDetails]:
        """Return the jobs of the run by the numbers of their attempts."""
        with self._asked():
            jobs = self._client.list_jobs()
        found = ((re.fullmatch(rf"{re.escape(run)}{ATTEMPT}(\d+)", job.submission_id or ""), job) for job in jobs)
        return {int(match[1]): job for match, job in found if match}

    def _details(self, job: str) -> JobDetails:
        with self._asked():
            return self._client.get_job_info(job)

    def _end(self, job: str) -> JobDetails:
        """Wait for the end of the job and return its details. Raises JobError after END_TIMEOUT_S seconds."""
        deadline = time.monotonic() + END_TIMEOUT_S
        while not (details := self._details(job)).status.is_terminal():
            if time.monotonic() > deadline:
                state = details.status.value.lower()
                raise JobError(f"expected {job} to end within {END_TIMEOUT_S:.0f} s, found it still {state}")
            time.sleep(POLL_S)
        return details

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Turn Ray's errors, some of them several lines of HTML or traceback, into one sentence."""
        try:
            yield
        except AuthenticationError:
            raise ClusterError(
                f"expected the token of the cluster at {self.address} in {TOKEN_PLACES}, found one that it refuses"
            ) from None
        except (requests.RequestException, aiohttp.ClientError, ConnectionError) as error:
            raise ClusterError(
                f"expected an answer of the cluster at {self.address}, found {type(error).__name__}"
            ) from None
        except (RuntimeError, ValueError, OSError) as error:
            if isinstance(error, JobError):
                raise
            lines = [line for line in str(error).splitlines() if line.strip(" .^")]
            raise JobError(f"expected the cluster at {self.address} to take the job, found {lines[-1]}") from None


def _authentication_mode(address: str) -> str:
    """Return "token" or "disabled", as the dashboard says to everybody. Raises ClusterError if there is none."""
    try:
        with urllib.request.urlopen(f"{address}/api/authentication_mode", timeout=TIMEOUT_S) as answer:
            return str(json.load(answer)["authentication_mode"])
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # a gateway before the dashboard that wants the token as well
            return "token"
        found = f"HTTP {error.code}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = str(getattr(error, "reason", error))
    raise ClusterError(f"expected the dashboard of a Ray cluster at {address}, found none ({found})")
