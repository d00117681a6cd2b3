"""Defines the base class of all settings that a YAML file may hold."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of settings: unknown keys are errors, and loaded settings cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)
