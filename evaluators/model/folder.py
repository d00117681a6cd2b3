"""This module reads a Hugging Face model folder lazily: configuration, tensor shapes, one tensor at a time."""

import hashlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from bitgenome.common import layout
from bitgenome.common.json_files import read_json_object
from bitgenome.common.remembered import Found, found_in
from evaluators.model.conversion import EMBEDDING, Conversion, is_plain
from evaluators.model.errors import ModelFolderError
from evaluators.model.scaled_view import scaled, source_of
from evaluators.model.stored import StoredTensors
from evaluators.model.weights_file import survey

__all__ = ["ModelFolder", "ModelFolderError", "is_gguf", "resolve_model"]

LARGEST_HALF = 65504.0  # of float16, in which GGUF types store weights or their scales
# which the file's tokenizer is made of, beside tokenizer.json and tokenizer_config.json
TOKENIZER_FILES = (
    "chat_template.jinja", "chat_template.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt",
)  # fmt: skip


class ModelFolder:
    """Reads ``config.json`` and the safetensors files of a folder; weights are loaded one tensor at a time.

    A scaled view (``evaluators.model.scaled_view``) reads like any other folder. Raises ModelFolderError if the folder,
    its configuration or its weights are missing or unreadable.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise ModelFolderError(f"expected a Hugging Face model folder, found nothing at {self.path}")
        config = self.path / "config.json"
        if not config.is_file():
            gguf = next((file.name for file in sorted(self.path.iterdir()) if is_gguf(file)), None)
            found = f"no more than {gguf}: name that file as the model" if gguf else "none"
            raise ModelFolderError(f"expected config.json in the model folder, found {found} in {self.path}")
        self.config: dict[str, Any] = read_json_object(config)
        self._source = source_of(self.path)
        self.stored = StoredTensors(self._source or self.path)

    @cached_property
    def conversion(self) -> Conversion | None:
        """How parameters are made of the stored tensors; None where these are the parameters."""
        return None if is_plain(self.config, self.stored.files) else Conversion(self.path, self.stored.files)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every parameter, by Hugging Face name. Raises ModelFolderError for tensors that make none."""
        stored = {name: shape for name, (shape, _) in self.stored.headers.items()}
        if self.conversion is None:
            return stored
        return {name: self.conversion.shape(name, stored) for name in self.conversion.names}

    def read(self, name: str) -> torch.Tensor:
        """Return one parameter on the CPU, in its stored type (float32 where a scaled view has factors for it).

        Raises KeyError for a name that the weights do not have.
        """
        assert not self.headers_alone, f"{self.path} has no values"
        read = self.stored.read
        tensor = self.conversion.tensor(name, read) if self.conversion else read([name])[name]
        return scaled(self.path, name, tensor) if self._source else tensor

    def _parts_of(self, name: str) -> list[str]:
        """Return the names of the stored tensors that a parameter is made of."""
        return self.conversion.stored_of(name) if self.conversion else [name]

    @cached_property
    def types(self) -> Mapping[str, str]:
        """Type of every parameter as safetensors names it, such as BF16, by Hugging Face name."""
        return {name: self.stored.headers[self._parts_of(name)[0]][1] for name in self.shapes}

    def file_of(self, name: str) -> Path:
        """Return the file that stores a parameter, or the first part of it."""
        return self.stored.files[self._parts_of(name)[0]]

    @cached_property
    def _surveys(self) -> Mapping[Path, Found]:
        """What ``survey`` finds in each weights file; a file that has not changed since the last time is not read."""
        files = sorted(set(self.stored.files.values()))
        return found_in(files, "weights", self._source or self.path, survey)

    def check_values(self, in_half: Iterable[str] = ()) -> None:
        """Raise ModelFolderError for an infinite or NaN value, and for one beyond float16 in a tensor of ``in_half``.

        The tensor is named. Weights are read once, and not at all if they have not changed since the last time.
        """
        halves = {part for name in in_half for part in self._parts_of(name)}
        for name, file in self.stored.files.items():
            largest = self._surveys[file]["largest"].get(name, 0.0)
            if largest is None:
                tensor = self.stored.read([name])[name]
                raise ModelFolderError(
                    f"expected finite weights, found {int((~tensor.isfinite()).sum())} of {tensor.numel()} not finite "
                    f"in {name} of {file}"
                )
            if name in halves and largest > LARGEST_HALF:
                raise ModelFolderError(
                    f"expected weights of at most {LARGEST_HALF:g}, the largest float16, in which GGUF types store "
                    f"weights or their scales, found {largest:g} in {name} of {file}"
                )

    @property
    def name(self) -> str:
        """Name of the folder, or of the model where the folder is a snapshot in the Hugging Face cache."""
        path = (self._source or self.path).resolve()
        return path.parent.parent.name.split("--")[-1] if path.parent.name == "snapshots" else path.name

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """Names of the GGUF files that the folder was made of; none for any other folder."""
        return self._opened("parts")

    @cached_property
    def coarse_types(self) -> tuple[str, ...]:
        """GGUF types, other than floats, that the weights were decoded from."""
        return self._opened("coarse")

    @property
    def full_precision(self) -> str | None:
        """What full precision means for a model that is not of floats, as the end of a sentence; None for others."""
        if not self.coarse_types:
            return None
        return f"what the {' and '.join(self.coarse_types)} weights of {self.parts[0]} decode to"

    @cached_property
    def headers_alone(self) -> bool:
        """Whether the folder is of a GGUF model that is not opened: shapes and types are known, and no values."""
        return bool(self.parts) and not self._opened("files")

    def _opened(self, key: str) -> tuple[str, ...]:
        record = self.path / layout.OPENED
        return tuple(map(str, read_json_object(record).get(key, ()))) if record.is_file() else ()

    @property
    def weights_bytes(self) -> int:
        """Bytes of the files of weights."""
        return sum(file.stat().st_size for file in set(self.stored.files.values()))

    @property
    def model_type(self) -> str:
        """``model_type`` of config.json, "" if there is none."""
        return str(self.config.get("model_type", ""))

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one tensor (no head is stored)."""
        return self._own_head not in self.shapes

    @property
    def _own_head(self) -> str:
        return self.conversion.head if self.conversion else "lm_head.weight"

    @property
    def embedding_tensor(self) -> str:
        """Hugging Face name of the embedding's weight."""
        return self.conversion.embedding if self.conversion else EMBEDDING

    @property
    def head_tensor(self) -> str:
        """Hugging Face name of the head's weight, which is the embedding's where the two are tied."""
        return self.embedding_tensor if self.tied else self._own_head

    @cached_property
    def digest(self) -> str:
        """sha256 over config.json, the tokenizer's files, a scaled view's factors and every weights file.

        The tokenizer's files that earlier versions left out come last, by name: without them the digest is theirs. That
        of headers alone is of no weights file, and of no model.
        """
        digest = hashlib.sha256()
        names = ("config.json", "tokenizer.json", "tokenizer_config.json", layout.SCALING_FACTORS)
        for file in filter(Path.is_file, (self.path / name for name in names)):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        for _, survey_of_file in sorted(self._surveys.items()) if not self.headers_alone else ():
            digest.update(bytes.fromhex(survey_of_file["sha256"]))
        templates = sorted(self.path.glob("additional_chat_templates/*.jinja"))
        for file in [*filter(Path.is_file, (self.path / name for name in TOKENIZER_FILES)), *templates]:
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()


def is_gguf(model: str | Path) -> bool:
    """Return whether a model is named by a GGUF file, by its path or URL."""
    return Path(model).suffix.lower() == ".gguf"


def resolve_model(name: str) -> Path:
    """Return the local folder of a model: ``name`` itself if it is a directory, else the snapshot of a Hugging Face id.

    A GGUF file is returned as it is. JSON, safetensors and tokenizer files of an id are downloaded, or taken from the
    cache. Raises ModelFolderError if ``name`` is none of these, or an id that cannot be fetched.
    """
    path = Path(name)
    if path.is_dir() or is_gguf(name):
        return path
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise ModelFolderError(f"expected a Hugging Face model folder or id, found no folder at {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelFolderError(
            f"expected a model folder or a Hugging Face id, found neither at {name} ({reason})"
        ) from None
