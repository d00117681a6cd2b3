"""Finds what a run's model is called on a hub, and under which licence it is."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bitgenome.common.files import json_object

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)$")  # folder of a model in huggingface_hub's cache
HUB_URL = re.compile(r"https?://huggingface\.co/([^/\s]+/[^/\s]+)/?")
REPOSITORY_KEYS = ("general.source.huggingface.repository", "general.source.repo_url", "general.repo_url")
LICENSE_KEYS = ("license", "license_name", "license_link")
ABOUT_KEYS = (
    *LICENSE_KEYS,
    "language",
    "pipeline_tag",
)  # of a card's front matter, what holds for a quantized model too
CARD = "README.md"


@dataclass(frozen=True)
class Base:
    """Holds the model that a file was made of: its name, its hub id if that is known, and what its card says of it."""

    name: str
    hub_id: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)  # of ABOUT_KEYS

    @property
    def license(self) -> str | None:
        """The licence's name on the hub, such as apache-2.0; None where it is not known."""
        found = self.about.get("license")
        return str(found) if found else None


def base_of(model: str, name: str, key_values: Mapping[str, Any]) -> Base:
    """Return what is known of ``model``, a folder, file, URL or hub id, without asking anybody.

    ``name`` is what it is called where no id is known; ``key_values`` are those of the run's file.
    """
    folder = Path(model)
    about: dict[str, Any] = {}
    if folder.is_dir():
        about = front_matter(folder / CARD)
        about = about or {"license": json_object(content(folder / "config.json")).get("license")}
    about = {key: about[key] for key in ABOUT_KEYS if about.get(key)}
    if "license" not in about:
        about |= {k: key_values[f"general.{k.replace('_', '.')}"] for k in LICENSE_KEYS if gguf_license(k, key_values)}
    hub_id = hub_id_of(model, key_values)
    return Base(hub_id.partition("/")[2] if hub_id else name, hub_id, about)


def gguf_license(key: str, key_values: Mapping[str, Any]) -> bool:
    """Return whether a GGUF file's key-values say something of a key of a card's front matter."""
    return isinstance(key_values.get(f"general.{key.replace('_', '.')}"), str)


def hub_id_of(model: str, key_values: Mapping[str, Any]) -> str | None:
    """Return the hub id that a model was given by, was fetched by, or has in its file; None where there is none."""
    if HUB_ID.fullmatch(model) and not Path(model).exists():
        return model
    for part in Path(model).parts:
        if match := CACHED.search(part):
            return f"{match[1]}/{match[2]}"
    for key in REPOSITORY_KEYS:
        found = str(key_values.get(key, ""))
        if match := HUB_URL.match(found):
            return match[1]
        if HUB_ID.fullmatch(found):
            return found
    return None


def front_matter(card: Path) -> dict[str, Any]:
    """Return the YAML at the beginning of a model card; {} where there is no card, or none in it that can be read."""
    text = content(card).decode("utf-8", "replace")
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def content(file: Path) -> bytes:
    """Return the bytes of a file, b"" where there is none."""
    return file.read_bytes() if file.is_file() else b""
