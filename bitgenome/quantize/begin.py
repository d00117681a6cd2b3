"""Turns a model and a size into the whole configuration of a run, and says in a line each what was chosen, and why."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitgenome.config.file import apply_override
from bitgenome.config.run import RunConfig, absolute_model, absolute_paths, parse_config
from bitgenome.plan.forecast import rates_here, too_large, workers_here
from bitgenome.plan.plan import Plan, free_space, make_plan
from bitgenome.plan.template import file_layout
from bitgenome.plan.text import ready_windows
from bitgenome.quantize.effort import EFFORTS, RECOMMENDED, Chosen, Effort, choose, merged
from bitgenome.quantize.machine import cpus_for_memory, with_workers
from bitgenome.quantize.notes import GIVEN_LEVELS, USUAL_LEVELS, WIDE_LEVELS, effort_notes, levels_note
from bitgenome.quantize.request import Request
from bitgenome.quantize.size import Sized, wanted_budget
from bitgenome.quantize.template import needed_template
from bitgenome.quantize.text import fitting_tokens, text_settings
from bitgenome.storage.opened import open_model
from evaluators.data.documents import TextError
from evaluators.model.folder import ModelFolder
from exporters.files.file_layout import FileLayout
from search.budget import parse_size
from search.types import SearchSpace
from workers.storage.folders import is_url

UNNAMED = re.compile(r"[^A-Za-z0-9._-]+")  # what may not stand in the name of a run
LONGEST_NAME = 160  # characters; the file system's own limit is 255
PLACEHOLDER = {"bits_per_weight": 4.5}  # a budget, until the size is known


@dataclass(frozen=True)
class Beginning:
    """A run that can begin: its settings as its file has them, as they are read, and what was chosen."""

    settings: dict[str, Any]
    config: RunConfig
    notes: tuple[tuple[str, str], ...]  # (what, in words)


@dataclass(frozen=True)
class _Base:
    """Everything but text in tokens, search and workers."""

    settings: dict[str, Any]
    notes: tuple[tuple[str, str], ...]


def begin(request: Request) -> Beginning:
    """Return the run that ``request`` asks for. No weight is read, but for a template that is to be made.

    Raises UserError (one sentence) for what cannot be, before any work.
    """
    request.size.check()
    base = settled(request)
    plan = make_plan(configured(request, base, EFFORTS[-1]), weights=False)
    cpus = cpus_for_memory(plan)
    plan = with_workers(plan, cpus_per_worker=cpus)
    base.settings["workers"] = {**base.settings["workers"], "cpus_per_worker": cpus}
    workers = workers_here(plan)
    chosen = choose(plan, rates_here(plan), workers, request.seconds, lambda effort: configured(request, base, effort))
    settings, shortened = fitted(request, base, chosen, plan)
    config = configuration(settings)
    plan = replace(plan, config=config)
    notes = [*base.notes, *effort_notes(chosen, plan, request.seconds), *shortened]
    if heavy := too_large(plan, chosen.stages):
        notes.append(("memory", f"more than there is here: {', '.join(heavy)}"))
    return Beginning(settings, config, tuple(notes))


def settled(request: Request) -> _Base:
    """Return what is decided by model, size and text alone."""
    given = overrides_alone(request.overrides)
    settings: dict[str, Any] = {
        "storage_path": str(Path(request.storage).absolute()) if not is_url(request.storage) else request.storage,
        "name": "unnamed",
        "model": absolute_model(str(Path(request.model).expanduser()) if request.model[:1] == "~" else request.model),
        "budget": PLACEHOLDER,
        **({"template": str(request.template.absolute())} if request.template else {}),
        "workers": {"ray": "auto", "cpus_per_worker": 1},
    }
    config = configuration(merged(settings, {key: given[key] for key in ("levels", "template") if key in given}))
    folder = open_model(config, weights=False)
    settings["name"] = request.name or run_name(folder.name, request.size.suffix)
    config = config.model_copy(update={"name": settings["name"]})
    notes = []
    made = None if config.template else needed_template(config, folder, request.converter, request.template_place)
    if made:
        settings["template"] = str(made)
        config = config.model_copy(update={"template": made})
        notes.append(("template", f"{made}, by llama.cpp's converter"))
    file = file_layout(config, folder)
    space, sized, levels = sized_space(request, config, folder, file, "levels" in given)
    if "levels" not in given:
        settings["levels"] = levels
    settings["budget"] = sized.budget
    settings["text"], why = text_settings(request.text, folder)
    if source := given.get("text", {}).get("source"):
        why = f"{source}, as set"
    millions = space.weights / 1e6
    notes = [
        ("model", f"{folder.name}, of type {folder.model_type}, {millions:,.1f} million weights"), *notes,
        ("size", sized.note), ("levels", levels_note(levels, config)), ("text", why),
    ]  # fmt: skip
    return _Base(settings, tuple(notes))


def sized_space(
    request: Request, config: RunConfig, folder: ModelFolder, file: FileLayout, fixed_levels: bool
) -> tuple[SearchSpace, Sized, str]:
    """Return the space of files, the budget, and the levels by name: all of them where the default's are too large."""
    space = free_space(file, folder, config.levels)
    if fixed_levels:
        return space, wanted_budget(request.size, space, file), GIVEN_LEVELS
    wide = free_space(file, folder, level_set(WIDE_LEVELS))
    sized = wanted_budget(request.size, wide, file)
    if bytes_of(sized.budget, wide) < space.file_bytes(space.smallest()):
        return wide, sized, WIDE_LEVELS
    return space, sized, USUAL_LEVELS


def level_set(name: str) -> tuple[str, ...]:
    """Return the levels of a preset."""
    return configuration({"name": "x", "model": "x", "budget": PLACEHOLDER, "levels": name}).levels


def bytes_of(budget: Mapping[str, Any], space: SearchSpace) -> int:
    """Return the bytes of a budget of bits or of a size."""
    if "file_size" in budget:
        return parse_size(budget["file_size"])
    return int(budget["bits_per_weight"] * space.weights / 8)


def configured(request: Request, base: _Base, effort: Effort) -> RunConfig:
    """Return the configuration with the text and the search of ``effort``, and the user's own settings."""
    return configuration(settings_of(request, base, effort))


def settings_of(request: Request, base: _Base, effort: Effort) -> dict[str, Any]:
    """Return the settings with those of ``effort``; the user's own come last."""
    settings = merged(base.settings, effort.settings(request.strategy))
    window = settings["text"]["window"]
    tokens = settings["text"]["tokens"]
    settings["text"]["tokens"] = {split: max(window, count) for split, count in tokens.items()}
    for override in request.overrides:
        apply_override(settings, override)
    return settings


def configuration(settings: dict[str, Any]) -> RunConfig:
    """Return settings as they are read, with absolute paths."""
    return absolute_paths(parse_config(settings, "the settings"))


def overrides_alone(overrides: tuple[str, ...]) -> dict[str, Any]:
    """Return the user's own settings, nested."""
    found: dict[str, Any] = {}
    for override in overrides:
        apply_override(found, override)
    return found


def fitted(request: Request, base: _Base, chosen: Chosen, plan: Plan) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the settings of ``chosen``, with fewer tokens where the given text holds no more, and a note of those.

    Raises UserError for a text that is missing, or too short for a window of each split.
    """
    settings = settings_of(request, base, chosen.effort)
    config = configuration(settings)
    try:
        ready_windows(replace(plan, config=config))
    except TextError:
        if request.text is None:
            raise
        shorter = fitting_tokens(config.text, plan.folder)
    else:
        return settings, []
    tokens = settings["text"]["tokens"] | shorter
    tokens["sensitivity"] = min(tokens["sensitivity"], tokens["search"])
    settings["text"]["tokens"] = tokens
    listed = ", ".join(f"{count:,} for {split}" for split, count in shorter.items())
    few = f"; {RECOMMENDED:,} or more for calibration are better" if tokens["calibration"] < RECOMMENDED else ""
    return settings, [("tokens", f"no more in {request.text} than {listed}{few}")]


def run_name(model: str, suffix: str) -> str:
    """Return a name for a run of ``model``."""
    name = UNNAMED.sub("-", f"{model[: LONGEST_NAME - len(suffix)]}-{suffix}").strip("-.")
    return name or "run"
