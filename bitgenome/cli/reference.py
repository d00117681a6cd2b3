"""The reference of all configuration keys: ``python -m bitgenome.cli.reference > docs/configuration.md``."""

import inspect
import re
from collections.abc import Iterator
from typing import Any, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bitgenome.batch.config import MatrixConfig
from bitgenome.config.file import sections_in
from bitgenome.config.run import RunConfig
from bitgenome.config.study import StudyConfig
from evaluators.study.catalogue import METHODS

Model = type[BaseModel]
INTRODUCTION = """# Configuration

Every key of a YAML file, with what it takes and its default. `--set KEY=VALUE` on the command line sets one, for
instance `--set search.generations=20`. Unknown keys are errors.
[What to choose](architecture.md#choosing-settings).

This page is generated: `python -m bitgenome.cli.reference > docs/configuration.md`.
"""
STUDIES = """The keys `text`, `quantization` and `workers` are those of a run. `methods` lists what is compared,
by `kind`; the `sweep` of a method gives settings lists of values, of which every combination is compared.
"""
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}  # of JSON schema
WORDS = {"object": "mapping", "string": "text", "any": "any value"}  # for JSON schema's types
HIDDEN = {"storage_url"}  # recorded in run.json, not given


def reference() -> str:
    """Return the whole page as Markdown."""
    methods = [f"### `kind: {kind}`\n\n{page(method)}" for kind, method in METHODS.items()]
    return "\n".join([
        INTRODUCTION,
        "## A run: `bitgenome run`, `plan`, `sensitivity`, `submit`\n",
        *sections(RunConfig),
        "## A batch: `bitgenome batch`\n",
        "A file of one run, or a matrix of them:\n",
        *sections(MatrixConfig),
        "## A study: `bitgenome study`\n",
        STUDIES,
        page(StudyConfig),
        *methods,
    ])  # fmt: skip


def sections(model: Model, path: str = "") -> Iterator[str]:
    """Yield the page of ``model``, then under headings of their own those of the sections in it."""
    yield f"### `{path}`\n\n{page(model, path)}" if path else page(model)
    for name, field in model.model_fields.items():
        for section in sections_in(field.annotation):
            yield from sections(section, f"{path}.{name}" if path else name)


def page(model: Model, path: str = "") -> str:
    """Return the docstring of ``model`` and a table of its keys; ``path`` is the section that they stand in."""
    schema = model.model_json_schema()
    hidden = HIDDEN | {name for name, found in schema["properties"].items() if "const" in found}
    shown = {name: field for name, field in model.model_fields.items() if name not in hidden}
    rows = [row(f"{path}.{name}".strip("."), field, schema) for name, field in shown.items()]
    lines = [as_markdown(inspect.getdoc(model) or ""), "", "| key | takes | default | meaning |", "|---|---|---|---|"]
    return "\n".join([*lines, *rows, ""])


def row(path: str, field: FieldInfo, schema: dict[str, Any]) -> str:
    """Return the line of the table for the key at ``path``, ``schema`` being the JSON schema of its section."""
    name = path.rpartition(".")[2]
    default = "required"
    if any(sections_in(field.annotation)) and "oneOf" not in schema["properties"][name]:  # of sections alone
        kind = "list of sections" if get_origin(field.annotation) is tuple else "section"
        kind, default = f"[{kind}](#{path.replace('.', '')})", default if field.is_required() else ""
    else:
        kind = takes(schema["properties"][name], schema.get("$defs", {}))
        if any(sections_in(field.annotation)):  # or a value
            kind = f"{kind.partition(' or ')[0]} or a list of [sections](#{path.replace('.', '')})"
        if not field.is_required():
            default = f"`{as_yaml(schema['properties'][name].get('default'))}`"
    meaning = (field.description or "").replace("|", "\\|")
    return f"| `{name}` | {kind} | {default} | {meaning} |"


def takes(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Return what a key takes, in words, from its JSON schema and the definitions that it refers to."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if options := schema.get("anyOf", schema.get("oneOf")):
        return " or ".join(dict.fromkeys(takes(option, definitions) for option in options))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if "properties" in schema:
        return f"mapping of {', '.join(f'`{name}`' for name in schema['properties'])}"
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {takes(schema['items'], definitions)}"
    bounds = " and ".join(f"{sign} {schema[key]:,}" for key, sign in BOUNDS.items() if key in schema)
    return f"{WORDS.get(kind, kind)} {bounds}".strip()


def as_yaml(value: Any) -> str:
    """Return ``value`` as a line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


def as_markdown(docstring: str) -> str:
    """Return a docstring with reStructuredText's literals as Markdown's."""
    return re.sub(r"``(.+?)``", r"`\1`", docstring)


if __name__ == "__main__":
    print(reference())  # noqa: T201 - the page is the program's output
