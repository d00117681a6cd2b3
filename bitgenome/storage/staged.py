"""Brings the files of tasks to every node where storage or model are behind URLs."""

from pathlib import Path
from typing import Protocol

from bitgenome.common import layout
from bitgenome.config.run import RunConfig
from bitgenome.storage.shared import Storage
from evaluators.model.folder import ModelFolder, is_gguf, resolve_model
from exporters.opening.source import parts_of
from workers.pool.base import Pool
from workers.storage.folders import is_url, mirror_root, open_folder
from workers.storage.staging import StagedPool, StorageRoot, stage


class StoredModel(Storage, Protocol):
    """Settings that say where runs and model are stored."""

    @property
    def model(self) -> str: ...


def staged_pool(pool: Pool, config: StoredModel, folder: ModelFolder) -> Pool:
    """Return ``pool``, with files brought to every node if storage or model are behind URLs."""
    roots = []
    if config.storage_url:
        roots.append(StorageRoot(config.storage_path, config.storage_url))
    if is_url(config.model) and not is_gguf(config.model):
        roots.append(StorageRoot(folder.path.parent, parent_of(config.model), changing=True))
    elif config.storage_url:
        roots.append(StorageRoot(folder.path.parent, f"{config.storage_url}/{model_folder(folder.digest)}"))
    # a file belongs to the nearest root: an opened model lies below the storage path, which may lie beside a model
    roots.sort(key=lambda root: len(root.local.absolute().parts), reverse=True)
    return StagedPool(pool, roots) if roots else pool


def model_folder(digest: str) -> str:
    """Return the path below the storage root at which a local model is stored for other nodes."""
    return f"{layout.SHARED}/{layout.MODEL_KIND}/{digest[:16]}"


def parent_of(url: str) -> str:
    """Return the URL of the directory that contains ``url``."""
    return url.rstrip("/").rpartition("/")[0]


def local_model(model: str) -> Path:
    """Return the directory of a model, or its GGUF file.

    ``model`` is either, a Hugging Face id, or a URL, of which this machine's copy is returned.
    """
    if not is_url(model):
        return resolve_model(model).resolve()
    parent, name = parent_of(model), model.rstrip("/").rpartition("/")[2]
    for file in [part.name for part in parts_of(Path(name))] if is_gguf(name) else [name]:
        stage(parent, mirror_root(parent), file, None, changing=True)
    return mirror_root(parent) / name


def with_stored_model(config: RunConfig, digest: str | None) -> RunConfig:
    """Return ``config`` with the model as stored for other nodes, if its own directory is not on this machine.

    ``digest`` is the recorded digest of the model. Without a stored model ``config`` is returned as it is.
    """
    if not (config.storage_url and digest and Path(config.model).is_absolute()) or Path(config.model).exists():
        return config
    names = open_folder(f"{config.storage_url}/{model_folder(digest)}").sizes()
    found = next((name.partition("/")[0] for name in names), None)
    url = f"{config.storage_url}/{model_folder(digest)}/{found}"
    return config.model_copy(update={"model": url}) if found else config
