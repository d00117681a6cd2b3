"""This module reads the tensors of a folder's safetensors files, by the names that they have there."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitgenome.common.json_files import read_json_object, refuse_lfs_pointer
from evaluators.model.errors import ModelFolderError

CONVERSION = (
    "convert it once, if you trust its author, with transformers' AutoModelForCausalLM.from_pretrained(FOLDER)"
    ".save_pretrained(FOLDER)"
)


class StoredTensors:
    """Reads the tensors of the safetensors files of a folder, some at a time; ``files`` has each tensor's, by name.

    Raises ModelFolderError if the weights are missing or unreadable.
    """

    def __init__(self, path: Path):
        self.files = _index(path)

    @cached_property
    def headers(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        """Shape and type of every tensor, the type as safetensors names it, such as BF16."""
        found = {}
        for file in dict.fromkeys(self.files.values()):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.offset_keys():
                    header = tensors.get_slice(name)
                    found[name] = tuple(header.get_shape()), str(header.get_dtype())
        return {name: found[name] for name in self.files}

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return tensors on the CPU, mapped from their files. Raises KeyError for a name that is not stored."""
        found: dict[str, Tensor] = {}
        for file in dict.fromkeys(self.files[name] for name in names):
            with safe_open(file, framework="pt") as tensors:
                found |= {name: tensors.get_tensor(name) for name in names if self.files[name] == file}
        return found


def _index(path: Path) -> dict[str, Path]:
    """Return the file of every tensor, sorted by tensor name."""
    index_file = path / "model.safetensors.index.json"
    if index_file.is_file():
        files = _listed_files(index_file)
    elif (path / "model.safetensors").is_file():
        files = [path / "model.safetensors"]  # alone: other *.safetensors beside it are copies in other layouts
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        pickled = next(path.glob("*.bin*"), None)
        found = f"{pickled.name}, which may hold code: {CONVERSION}" if pickled else "none"
        raise ModelFolderError(f"expected *.safetensors weights in {path}, found {found}")
    index: dict[str, Path] = {}
    for file in files:
        refuse_lfs_pointer(file)
        try:
            with safe_open(file, framework="pt") as tensors:
                index.update(dict.fromkeys(tensors.keys(), file))
        except (SafetensorError, OSError) as error:
            raise ModelFolderError(f"expected a readable safetensors file, found {error} in {file}") from None
    return dict(sorted(index.items()))


def _listed_files(index_file: Path) -> list[Path]:
    """Return the files that an index lists; raise ModelFolderError unless all of them are there."""
    weight_map = read_json_object(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelFolderError(f"expected weight_map with a file for every tensor in {index_file}, found none")
    listed = sorted(set(weight_map.values()))
    if outside := [name for name in listed if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise ModelFolderError(f"expected weights inside the model folder, found {outside[0]} in {index_file}")
    files = [index_file.parent / name for name in listed]
    if missing := [file for file in files if not file.is_file()]:
        raise ModelFolderError(
            f"expected the {len(files)} files that {index_file} lists, found no {missing[0].name}"
            + (f" and {len(missing) - 1} more missing" if len(missing) > 1 else "")
        )
    return files
