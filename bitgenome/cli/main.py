"""Defines the command line; EXIT_CODES says what its commands end with."""

import logging
import os
import signal
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.markup import escape
from typer.core import TyperGroup
from typer.exceptions import TyperException

from bitgenome.cli.batch import batch
from bitgenome.cli.compare import compare
from bitgenome.cli.convert import convert
from bitgenome.cli.doctor import doctor
from bitgenome.cli.front import export, front
from bitgenome.cli.jobs import logs, stop, submit
from bitgenome.cli.pages import report, watch
from bitgenome.cli.prune import prune
from bitgenome.cli.publish import publish
from bitgenome.cli.quantize import add_quantize
from bitgenome.cli.status import status
from bitgenome.cli.terminal import RUNS, AsJson, ConfigFile, Overrides, RunPath, Storage, console, errors, print_json
from bitgenome.cli.verify import verify
from bitgenome.common.errors import UserError
from bitgenome.observe.logs import show_from, shown, start_logging
from workers.cluster.worker_logs import LOG_JSON
from workers.errors import TaskError, WorkersLostError

if TYPE_CHECKING:  # commands import what they need when called, so that small ones start fast
    from bitgenome.config.run import RunConfig

EVERYWHERE = ("quiet", "verbose")  # options that are taken before a command's name and behind it
EXIT_CODES = (
    "Exit codes: 0 done; 1 a task failed, machines were lost too often, runs of a batch failed, or doctor found "
    "something broken (what is done is kept); 2 something that you can mend, told in one sentence; 130 interrupted, "
    "and resumable. submit --wait exits with its job's code."
)


class Commands(TyperGroup):
    """The commands, each of which also takes the options of EVERYWHERE."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command of that name, None if there is none."""
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            have = {parameter.name for parameter in command.params}
            command.params += [own for own in self.params if own.name in EVERYWHERE and own.name not in have]
        return command


app = typer.Typer(
    cls=Commands,
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
terminated = threading.Event()


def show_version(wanted: bool) -> None:
    """Print the version and exit, if ``wanted``."""
    if wanted:
        console.print(f"bitgenome {version('bitgenome')}", highlight=False)
        raise typer.Exit


def quieter(wanted: bool) -> None:
    """Show only warnings, errors and results, if ``wanted``."""
    if wanted:
        show_from(logging.WARNING)


def louder(wanted: bool) -> None:
    """Show what otherwise only a run's events.log has, if ``wanted``."""
    if wanted:
        show_from(logging.DEBUG)


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True)] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", envvar=LOG_JSON, help="Log JSON objects, a line each; Ray's workers too")
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", callback=quieter, expose_value=False, help="Warnings, errors and results only"),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", callback=louder, expose_value=False, help="Also what only events.log has"),
    ] = False,
) -> None:
    """Search mixed-precision GGUF quantizations: what is searched is what ships."""
    if log_json:
        os.environ[LOG_JSON] = "1"  # read by whoever starts workers
        start_logging(errors, as_json=True, level=shown()[0].level)


@app.command()
def run(config: ConfigFile, overrides: Overrides = None) -> None:
    """Search, export and prove; continues a run of the same configuration."""
    from bitgenome.config.run import load_config  # noqa: PLC0415 - here and below: imported when called

    execute(load_config(config, overrides or ()))


@app.command()
def resume(run: RunPath, storage: Storage = RUNS) -> None:
    """Continue an interrupted run to the same result."""
    from bitgenome.run.resume import config_to_resume  # noqa: PLC0415
    from bitgenome.storage.run_names import run_location  # noqa: PLC0415

    execute(config_to_resume(run_location(run, storage)))


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    tensors: Annotated[
        bool, typer.Option("--tensors", "--full", help="Every tensor, not only their kinds, before the summary")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show sizes, budget, and time, memory and disk of every stage; loads no weights."""
    from bitgenome.cli.plan_view import plan_record, show_plan  # noqa: PLC0415
    from bitgenome.config.run import load_config  # noqa: PLC0415
    from bitgenome.plan.forecast import forecast, rates_here, workers_here  # noqa: PLC0415
    from bitgenome.plan.memory import check_memory  # noqa: PLC0415
    from bitgenome.plan.plan import make_plan  # noqa: PLC0415
    from bitgenome.plan.seeds import check_seeds  # noqa: PLC0415
    from bitgenome.plan.text import ready_windows  # noqa: PLC0415

    found = make_plan(load_config(config, overrides or ()), weights=False)
    check_memory(found)
    check_seeds(found)
    ready_windows(found)  # a text that a run would refuse is refused here
    rates, workers = rates_here(found), workers_here(found)
    stages = forecast(found, rates, workers)
    if as_json:
        print_json(plan_record(found, rates, stages, workers))
    else:
        show_plan(found, rates, stages, workers, tensors, console)


@app.command()
def export_optuna(
    run: RunPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="The journal file; an earlier one is replaced")],
    objective: Annotated[
        list[str] | None, typer.Option(help="What is minimized: loss, kl, file_bytes, ...; again for several")
    ] = None,
    storage: Storage = RUNS,
) -> None:
    """Write what a run evaluated as Optuna's trials, for optuna-dashboard and JournalStorage."""
    from bitgenome.api.run import Run  # noqa: PLC0415

    studies = Run.open(run, storage).to_optuna(output, objective or ("loss",))
    for study in studies:
        console.print(f"study  {study}", soft_wrap=True, markup=False)
    console.print(f"Open it with: optuna-dashboard {output}", soft_wrap=True, markup=False)


@app.command()
def study(
    config: ConfigFile,
    overrides: Overrides = None,
    allocations: Annotated[bool, typer.Option(help="Show how each method spread its bits, layer by layer")] = False,
) -> None:
    """Compare quantization methods by simulation: a table and a picture; methods already measured are kept."""
    from bitgenome.config.study import load_study  # noqa: PLC0415
    from bitgenome.study.report import show_allocation, show_results, statistics_of  # noqa: PLC0415
    from bitgenome.study.study import run_study  # noqa: PLC0415

    try:
        path, results = run_study(load_study(config, overrides or ()), console)
    except KeyboardInterrupt:
        errors.print(f"interrupted; what is measured is kept. Continue with: bitgenome study {config}", soft_wrap=True)
        raise typer.Exit(130) from None
    if allocations:
        for result in results:
            show_allocation(statistics_of(result), console)
    show_results(results, path, console)


@app.command()
def sensitivity(
    config: ConfigFile,
    overrides: Overrides = None,
    genomes: Annotated[int, typer.Option(min=3, help="Random genomes that each measure is held against")] = 60,
    bits: Annotated[list[float] | None, typer.Option(help="Budget of the exact solver, bits per weight")] = None,
) -> None:
    """Compare sensitivity measures: what each costs, how it ranks genomes, and the KL that its exact solution has."""
    from bitgenome.config.run import load_config  # noqa: PLC0415
    from bitgenome.run.sensitivity_comparison import compare_sensitivities, show_comparison  # noqa: PLC0415

    try:
        path, frame = compare_sensitivities(load_config(config, overrides or ()), genomes, bits or (), console)
    except KeyboardInterrupt:
        errors.print(
            f"interrupted; what is measured is kept. Continue with: bitgenome sensitivity {config}", soft_wrap=True
        )
        raise typer.Exit(130) from None
    show_comparison(frame, path, console)


app.command()(export)
app.command()(front)
app.command()(publish)
app.command()(convert)
app.command()(compare)
app.command()(batch)
app.command()(submit)
app.command()(logs)
app.command()(stop)
app.command()(status)
app.command()(report)
app.command()(watch)
app.command()(prune)
app.command()(doctor)
app.command()(verify)


def execute(config: "RunConfig") -> None:
    """Run ``config`` and show its outcome; an interrupt shows how to resume it and exits with code 130."""
    from bitgenome.cli.tables import show_outcome  # noqa: PLC0415
    from bitgenome.run.pipeline import run as run_pipeline  # noqa: PLC0415

    directory = f"{config.storage_root}/{config.name}"
    try:
        show_outcome(run_pipeline(config, console), console)
        if config.storage_url:
            console.print(f"stored  {directory}", soft_wrap=True, highlight=False)
    except KeyboardInterrupt:
        errors.print(f"interrupted; nothing is lost. Continue with: bitgenome resume {directory}", soft_wrap=True)
        raise typer.Exit(130) from None


add_quantize(app, execute)


def interrupt(signum: int, frame: FrameType | None) -> None:
    """Treat SIGTERM, as Ray and schedulers send it, like Ctrl-C.

    Further ones are ignored, so that nothing disturbs the ending.
    """
    terminated.set()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def leave(code: int) -> NoReturn:
    """End the process with exit code ``code``.

    After SIGTERM it ends at once: libraries take seconds to be torn down, and Ray grants three.
    """
    if terminated.is_set():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def main() -> None:
    """Run the command line; users' mistakes end in one sentence and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    start_logging(errors)
    for noisy in ("httpx", "gguf", "ray", "botocore", "aiobotocore", "gguf.gguf_writer"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.raiseExceptions = False  # a log on a full disk is no reason for tracebacks
    signal.signal(signal.SIGTERM, interrupt)
    try:
        code = app(prog_name="bitgenome", standalone_mode=False)  # an Exit of a command comes back as its code
    except (typer.Abort, KeyboardInterrupt):
        leave(130)
    except UserError as error:
        fail(str(error), 2)
    except (TaskError, WorkersLostError) as error:
        fail(f"{error}; what was done is kept, and resume continues from there", 1)
    except TyperException as error:
        if not error.format_message():  # nothing was asked for: the help is shown already
            leave(0)
        fail(error.format_message(), 2)
    except OSError as error:
        fail(f"expected to read or write {error.filename or 'files'}, found: {error.strerror or error}", 2)
    leave(code or 0)


def fail(sentence: str, code: int) -> NoReturn:
    """Show ``sentence`` as an error and exit with ``code``."""
    if os.environ.get(LOG_JSON):
        logging.getLogger("bitgenome").error(sentence)
    else:
        errors.print(f"[bold red]error:[/] {escape(sentence)}", soft_wrap=True, highlight=False)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
