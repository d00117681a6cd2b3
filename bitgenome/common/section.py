"""The base of all settings that a YAML file may hold."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of settings: unknown keys are errors, and loaded settings do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)
