"""Reads YAML files into validated settings, and reports a problem in one sentence."""

import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from bitgenome.common.errors import UserError

S = TypeVar("S", bound=BaseModel)


class _UniqueKeys(yaml.SafeLoader):
    """Reads YAML as SafeLoader does, and refuses a mapping with the same key twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.composer.ComposerError(
                    problem=f"the key {key.value!r} in line {lines[key.value]} and again in line {line}: give it once"
                )
            lines[key.value] = line
        return node


def load_yaml(text: str) -> Any:
    """Return the plain data of a YAML text. Raises yaml.YAMLError if it is none, or gives a key twice."""
    loader = _UniqueKeys(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


URL_WITH_PASSWORD = re.compile(r"[\w+.-]+://[^/@\s]*:[^/@\s]+@")
STANDARD_INPUT = Path("-")


def read_settings(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the mapping in a YAML file, with overrides applied.

    ``path`` may be ``-`` for standard input. ``overrides`` are texts such as ``search.generations=20``. Raises
    UserError if the file is missing or holds no mapping, or if an override cannot be applied.
    """
    if path != STANDARD_INPUT and not path.is_file():
        raise UserError(f"expected a configuration file, found nothing at {path}")
    try:
        data = load_yaml(sys.stdin.read() if path == STANDARD_INPUT else path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"expected YAML in {path}, found {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"expected a mapping of settings in {path}, found {type(data).__name__}")
    for override in overrides:
        apply_override(data, override)
    return data


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one dotted key of ``data`` in place from ``KEY=VALUE``; the value is read as YAML.

    Setting one kind of budget replaces another. Raises UserError if the override cannot be read or applied.
    """
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise UserError(f"expected --set KEY=VALUE, found {override!r}")
    try:
        parsed = load_yaml(value)
    except yaml.YAMLError:
        raise UserError(f"expected a YAML value in --set {override}, found {value!r}") from None
    set_key(data, key, parsed, f"--set {key}")


def set_key(data: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Set one dotted key of ``data`` in place; ``source`` names it in errors.

    Setting one kind of budget replaces another. Raises UserError if a parent of the key is not a section.
    """
    *parents, last = key.split(".")
    section = data
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise UserError(f"expected a section {parent!r} for {source}, found a value")
    if parents == ["budget"]:
        section.clear()
    section[last] = value


def parse_section(kind: type[S], data: Any, source: str) -> S:
    """Return ``data`` as settings of class ``kind``; ``source`` names it in errors.

    Raises UserError for the first problem, or for a URL with a password.
    """
    refuse_secrets(data, source)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise UserError(_sentence(error, source, kind)) from None


def refuse_secrets(data: Any, source: str, key: str = "") -> None:
    """Raise UserError if ``data`` contains a URL with a password; ``source`` and ``key`` name it in the error.

    Settings are recorded in run directories and shown by dashboards.
    """
    if isinstance(data, dict):
        for name, value in data.items():
            refuse_secrets(value, source, f"{key}.{name}" if key else str(name))
    elif isinstance(data, str) and URL_WITH_PASSWORD.match(data):
        raise UserError(
            f"expected {key} in {source} without a password, found one in its URL: give it in the environment"
        )


def _sentence(error: ValidationError, source: str, kind: type[BaseModel]) -> str:
    """Return one sentence on the first problem of ``error``."""
    problem = error.errors()[0]
    place = [str(part) for part in problem["loc"] if not str(part).startswith("<")]  # which form a value has
    location = ".".join(place)
    if problem["type"] == "extra_forbidden":
        *parents, key = place
        names = _section_at(kind, parents).model_fields
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.4)
        hint = f"did you mean {'.'.join([*parents, near[0]])}?" if near else f"known keys: {', '.join(names)}"
        return f"unknown key {location!r} in {source}: {hint}"
    if problem["type"] == "missing":
        return f"expected key {location!r} in {source}, found none"
    message = problem["msg"].removeprefix("Value error, ")
    found = "" if isinstance(problem["input"], dict | BaseModel) else f", found {problem['input']!r}"
    return f"{location or 'configuration'} in {source}: {message}" + ("" if "found" in message else found)


def _section_at(kind: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    """Return the class of the settings at ``path``, a list of keys below ``kind``."""
    section = kind
    for part in path:
        if part in section.model_fields:  # not an index into a list
            section = next(sections_in(section.model_fields[part].annotation), section)
    return section


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the settings classes that an annotation names, also inside optional values and lists."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from sections_in(inner)
