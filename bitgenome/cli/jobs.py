"""Defines ``bitgenome submit``, ``logs`` and ``stop``, which handle runs as jobs of a Ray cluster."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitgenome.cli.terminal import ConfigFile, Overrides, console, errors
from bitgenome.common.errors import UserError

if TYPE_CHECKING:
    from workers.cluster.jobs import Jobs

Address = Annotated[
    str | None,
    typer.Option(
        help="The cluster's dashboard, http://HOST:PORT; by default of the one that you have started on this machine",
        envvar="RAY_API_SERVER_ADDRESS",
    ),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Use another machine's cluster that asks for no token")]
RunName = Annotated[
    str, typer.Argument(help="A run's name or directory (its last attempt), or an attempt", show_default=False)
]
KINDS = {dict: "mapping", list: "list"}
DASHBOARD = "http://127.0.0.1:8265"


def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Address = None,
    insecure: Insecure = False,
    wait: Annotated[bool, typer.Option("--wait", help="Show its log and end with its exit code")] = False,
    num_cpus: Annotated[float, typer.Option("--entrypoint-num-cpus", min=0, help="CPUs kept for the driver")] = 0.0,
    num_gpus: Annotated[float, typer.Option("--entrypoint-num-gpus", min=0, help="GPUs kept for the driver")] = 0.0,
    resources: Annotated[
        str | None, typer.Option("--entrypoint-resources", help="The driver's other resources: '{\"head\": 1}'")
    ] = None,
    image: Annotated[str | None, typer.Option(help="Container image of driver and workers")] = None,
    runtime_env: Annotated[Path | None, typer.Option(help="YAML of a Ray runtime environment")] = None,
    lock: Annotated[Path | None, typer.Option(help="Pinned requirements to install (constraints.txt)")] = None,
    wheel: Annotated[Path | None, typer.Option(help="bitgenome's own wheel, for a cluster without it")] = None,
) -> None:
    """Run a configuration as a job of a Ray cluster; a resubmission continues an attempt that ended early.

    Paths in the configuration are the cluster's; relative ones start where its head was started.
    """
    from workers.cluster.jobs import Submission  # noqa: PLC0415 - ray takes seconds to import

    environment = environment_of(image, runtime_env, lock, wheel)
    run, settings, metadata = job_settings(config, overrides or (), insecure)
    reserved = resources_of(resources)
    submission = Submission(run, settings, metadata, environment, num_cpus, num_gpus, reserved)
    jobs = jobs_at(address, insecure)
    job = jobs.submit(submission)
    console.print(f"submitted {job}; bitgenome logs {run} --follow, bitgenome stop {run}", soft_wrap=True)
    if wait:
        raise typer.Exit(follow_to_end(jobs, job))


def logs(
    run: RunName,
    address: Address = None,
    insecure: Insecure = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends")] = False,
) -> None:
    """Show what a run's job has written."""
    from bitgenome.storage.run_names import run_name  # noqa: PLC0415

    jobs = jobs_at(address, insecure)
    job = jobs.find(run_name(run))
    if follow:
        show(jobs.follow(job))
    else:
        show([jobs.logs(job)])


def stop(run: RunName, address: Address = None, insecure: Insecure = False) -> None:
    """Stop a run's job; what is evaluated is kept, and a resubmission continues from there."""
    from bitgenome.storage.run_names import run_name  # noqa: PLC0415

    jobs = jobs_at(address, insecure)
    job = jobs.find(run_name(run))
    console.print(f"{job} {jobs.stop(job)}; bitgenome submit continues it", soft_wrap=True)


def jobs_at(address: str | None, insecure: bool) -> "Jobs":
    """Return the jobs of the cluster whose dashboard is at ``address``, by default this user's own; says which.

    Raises ClusterError if there is no such cluster, or the one at the default address is not this user's.
    """
    from workers.cluster.jobs import Jobs  # noqa: PLC0415 - ray takes seconds to import
    from workers.cluster.own_cluster import check_own  # noqa: PLC0415

    environment = os.environ.get(
        "RAY_ADDRESS", ""
    )  # may be a cluster's own address, HOST:PORT, which is no dashboard's
    if named := address or (environment if environment.startswith(("http://", "https://")) else None):
        return Jobs(named, insecure)
    jobs = Jobs(DASHBOARD, insecure)
    check_own(DASHBOARD)
    errors.print(f"taking the cluster at {DASHBOARD}, which you have started", soft_wrap=True, highlight=False)
    return jobs


def follow_to_end(jobs: "Jobs", job: str) -> int:
    """Show a job's log to its end, and return the job's exit code."""
    try:
        show(jobs.follow(job))
        code = jobs.exit_code(job)
    except KeyboardInterrupt:
        errors.print(f"{job} goes on; bitgenome stop {job} ends it", soft_wrap=True)
        raise
    if code:
        errors.print(jobs.message(job)[:300], soft_wrap=True, markup=False)
    return code


def show(pieces: Iterable[str]) -> None:
    """Print a job's log as it is, without markup or wrapping."""
    for piece in pieces:
        console.out(piece, end="", highlight=False)


def job_settings(path: Path, overrides: Iterable[str], insecure: bool) -> tuple[str, str, dict[str, str]]:
    """Return the name of the run, its settings as JSON, and the metadata that the dashboard shows.

    Raises UserError for a configuration that cannot run as a job.
    """
    from importlib.metadata import version  # noqa: PLC0415

    from bitgenome.config.file import read_settings  # noqa: PLC0415
    from bitgenome.config.run import parse_config  # noqa: PLC0415

    settings = read_settings(path, list(overrides))
    if insecure:
        settings.setdefault("workers", {})["insecure"] = True
    config = parse_config(settings, str(path))  # paths stay as they are: they are the cluster's
    if config.workers.ray == "local":
        raise UserError("expected workers.ray: auto in a job, which has a cluster, found local: --set workers.ray=auto")
    metadata = {
        "run": config.name,
        "config_digest": config.digest,
        "model": config.model,
        "strategy": config.search.strategy,
        "bitgenome": version("bitgenome"),
    }
    return config.name, json.dumps(settings, default=str), metadata


def environment_of(image: str | None, file: Path | None, lock: Path | None, wheel: Path | None) -> dict[str, Any]:
    """Return Ray's runtime environment; {} uses the cluster's own installation.

    ``image`` is a container image, ``file`` the YAML of a runtime environment, ``lock`` a file of pinned requirements,
    and ``wheel`` bitgenome's own wheel. Raises UserError if they exclude each other or cannot be used.
    """
    if image and (file or lock or wheel):
        raise UserError("expected an image or an environment to install, found both: give --image alone")
    if file and lock:
        raise UserError("expected one list of requirements, found --runtime-env and --lock: give one of them")
    if image:
        return {"image_uri": image}
    environment: dict[str, Any] = {}
    if file:
        from bitgenome.config.file import read_settings  # noqa: PLC0415

        environment = {key: value for key, value in read_settings(file).items() if value is not None}  # null: absent
        for key, kind in (("env_vars", dict), ("py_modules", list)):
            if not isinstance(found := environment.get(key, kind()), kind):
                raise UserError(f"expected {key} as a {KINDS[kind]} in {file}, found {found!r}")
    if lock:
        environment["pip"] = requirements_in(lock)
    if wheel:
        if wheel.suffix != ".whl" or not wheel.is_file():
            raise UserError(f"expected a wheel (*.whl), found none at {wheel}")
        environment["py_modules"] = [*environment.get("py_modules", []), str(wheel)]
    return environment


def requirements_in(lock: Path) -> list[str]:
    """Return the requirements in a lock file. Raises UserError if it cannot be read."""
    try:
        lines = [line.partition("#")[0].strip() for line in lock.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError):
        raise UserError(f"expected pinned requirements, found no readable file at {lock}") from None
    return [line for line in lines if line]


def resources_of(text: str | None) -> dict[str, float]:
    """Return amounts by resource name, from JSON. Raises UserError for anything else."""
    try:
        return {str(name): float(amount) for name, amount in json.loads(text or "{}").items()}
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"expected --entrypoint-resources as JSON of amounts by name, found {text!r}") from None
