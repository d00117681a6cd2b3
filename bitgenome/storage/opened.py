"""Opens the model that a configuration names: a folder as it is, a GGUF file once as a folder among what runs share."""

import shutil
import tempfile
import weakref
from pathlib import Path

from bitgenome.common import layout
from bitgenome.common.digests import digest_of, digests_of_files
from bitgenome.common.errors import UserError
from bitgenome.common.files import json_object
from bitgenome.common.remembered import found_in
from bitgenome.storage.lease import Lease
from bitgenome.storage.shared import note_use, shared_directory
from bitgenome.storage.staged import StoredModel, local_model
from evaluators.model.folder import ModelFolder, is_gguf
from evaluators.model.weights_file import survey
from exporters.opening.folder import openable, write_folder
from exporters.opening.source import files_of, stem_of

SCHEMA = 1  # raise when the folder of a file changes


def open_model(config: StoredModel, weights: bool = True) -> ModelFolder:
    """Return the folder of the model that ``config`` names.

    A GGUF file is opened once: its folder is a shared artefact of this machine, by a digest of the file. Without
    ``weights`` nothing is read but headers, and the folder, which then is a temporary one, holds no values.
    Raises UserError for a model that cannot be read.
    """
    path = local_model(config.model)
    if not is_gguf(path):
        return ModelFolder(path)
    files = files_of(path)
    if not weights:
        return _headers(path)
    digests = digests_of_files(files, path)
    directory = shared_directory(config, layout.OPENED_KIND, digest_of(SCHEMA, *(digests[file] for file in files)))
    folder = directory / stem_of(path)
    if not _whole(folder):
        with Lease(directory, f"the model of {path}", wait=True):
            if not _whole(folder):
                model = openable(path)
                check_space(model.bytes, path, directory)
                write_folder(model, folder)
    return ModelFolder(folder)


def check_space(needed: int, path: Path, directory: Path) -> None:
    """Raise UserError unless ``needed`` bytes are free where the model of ``path`` is to be opened."""
    if (free := shutil.disk_usage(directory).free) < needed:
        raise UserError(
            f"expected {needed / 1e9:.1f} GB of free disk for the weights of {path}, found {free / 1e9:.1f} GB in "
            f"{directory}"
        )


def note_model(config: StoredModel, folder: ModelFolder) -> None:
    """List an opened model among what the run of ``config`` uses; do nothing for another folder."""
    if folder.path.parent.parent.name == layout.OPENED_KIND:
        note_use(config, f"{layout.OPENED_KIND}/{folder.path.parent.name}")


def _headers(path: Path) -> ModelFolder:
    """Return a temporary folder of the model's headers, which is removed when nobody uses it any more."""
    model = openable(path)
    directory = Path(tempfile.mkdtemp(prefix="bitgenome-"))
    try:
        write_folder(model, directory / stem_of(path), weights=False)
        folder = ModelFolder(directory / stem_of(path))
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    weakref.finalize(folder, shutil.rmtree, directory, ignore_errors=True)
    return folder


def _whole(folder: Path) -> bool:
    """Return whether a folder was written to its end, and is as it was written."""
    record = folder / layout.OPENED
    if not record.is_file():
        return False
    written = json_object(record.read_bytes()).get("files", {})
    files = [folder / name for name in written]
    if not files or not all(file.is_file() for file in files):
        return False
    if any(file.stat().st_size != written[file.name]["bytes"] for file in files):
        return False
    found = found_in(files, "weights", folder, survey)  # as the folder itself reads them
    return all(written[file.name]["sha256"] == found[file]["sha256"] for file in files)
