"""What all parts of the config's schema are made of. Imports nothing heavy."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key, the value, the rule and the remedy."""


class Strict(BaseModel):
    """Unknown keys are refused; a config never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
