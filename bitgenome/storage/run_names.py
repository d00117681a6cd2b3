"""Finds the run that a command's argument names: by its directory or URL, or by its name below the storage path."""

from pathlib import Path

from bitgenome.common import layout
from bitgenome.common.errors import UserError
from workers.storage.folders import is_url, open_folder

SHOWN_RUNS = 5


def run_location(named: str, storage: str) -> str:
    """Return the path or URL of the run that ``named`` names: a run directory, such as ".", or a name in ``storage``.

    ``storage`` is a storage path or URL. Raises UserError if there is no such run.
    """
    if is_url(named):
        return named.rstrip("/")
    path = absolute(named)
    if (path / layout.RECORD).is_file():
        return named.rstrip("/") if Path(named).name == path.name else str(path)
    below = f"{storage.rstrip('/')}/{named}"
    if Path(named).name == named and has_run(below):
        return below
    if path.is_file() and (path.parent / layout.RECORD).is_file():
        raise UserError(f"expected a run directory, found the file {named} of one: name its folder, {path.parent}")
    raise UserError(
        f"expected a run directory with {layout.RECORD}, or the name of a run in {storage}, found neither at {named}"
        f"{runs_there(storage)}"
    )


def run_and_file(named: str, storage: str, run: str | None = None) -> tuple[str, str | None]:
    """Return the location of the run and the path or URL of the GGUF file that ``named`` names.

    ``named`` is a GGUF file in its run directory, or anywhere if ``run`` names its run; or a run, whose own file is
    meant: then the file is None. Raises UserError if there is no such file or run.
    """
    if is_url(named) and named.endswith(".gguf"):
        return (run_location(run, storage) if run else named.rpartition("/")[0]), named
    file = Path(named).expanduser()
    if file.is_file():
        return run_location(run or str(file.parent), storage), str(file)
    if named.endswith(".gguf"):
        raise UserError(f"expected a GGUF file, found none at {named}")
    if run:
        raise UserError(f"expected a GGUF file beside --run, found none at {named}")
    return run_location(named, storage), None


def run_name(named: str) -> str:
    """Return the name of the run that ``named`` names, which may be its directory."""
    path = absolute(named)
    return path.name if (path / layout.RECORD).is_file() else named


def absolute(named: str) -> Path:
    """Return the absolute path, with a name at its end; links stay: one to a run elsewhere is refused later."""
    path = Path(named).expanduser()
    return path.resolve() if ".." in path.parts else path.absolute()


def has_run(location: str) -> bool:
    """Return whether there is a run at a path or URL."""
    if is_url(location):
        return open_folder(location).read(layout.RECORD) is not None
    return (Path(location) / layout.RECORD).is_file()


def runs_there(storage: str) -> str:
    """Return a phrase with the names of some runs in a local storage path, "" if there is none."""
    if is_url(storage) or not Path(storage).is_dir():
        return ""
    names = sorted(file.parent.name for file in Path(storage).glob(f"*/{layout.RECORD}"))
    more = f" and {len(names) - SHOWN_RUNS} more" if len(names) > SHOWN_RUNS else ""
    return f"; there are {', '.join(names[:SHOWN_RUNS])}{more}" if names else ""
