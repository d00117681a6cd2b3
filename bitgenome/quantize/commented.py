"""Writes the settings of a run as YAML, each with a line on what it is."""

from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Any

import yaml
from pydantic import BaseModel

from bitgenome.config.file import sections_in
from bitgenome.config.run import RunConfig

WIDTH = 116  # characters of a line of comment
ELSEWHERE = "All other settings, with their defaults: docs/configuration.md of bitgenome."


def commented_yaml(settings: Mapping[str, Any], introduction: Sequence[str]) -> str:
    """Return ``settings``, nested as in the file, as YAML with the settings' own descriptions.

    ``introduction`` are lines of comment at the top. Keys are in the order in which they are declared.
    """
    lines = [
        *(f"# {line}".strip() for line in introduction),
        "",
        *_section(settings, RunConfig, ""),
        "",
        f"# {ELSEWHERE}",
    ]
    return "\n".join(lines) + "\n"


def _section(settings: Mapping[str, Any], kind: type[BaseModel], indent: str) -> Iterator[str]:
    """Yield the lines of one section, whose class is ``kind``."""
    for name, field in kind.model_fields.items():
        if name not in settings:
            continue
        value, inner = settings[name], next(sections_in(field.annotation), None)
        yield from (f"{indent}# {line}" for line in wrap(field.description or name, WIDTH - len(indent)))
        if inner and isinstance(value, Mapping):
            yield f"{indent}{name}:"
            yield from _section(value, inner, f"{indent}  ")
        else:
            yield f"{indent}{name}: {_value(value)}"


def _value(value: Any) -> str:
    """Return a value as a line of YAML."""
    return str(yaml.safe_dump(value, default_flow_style=True, width=10**6)).removesuffix("\n...\n").strip()
