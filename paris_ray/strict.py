"""What all parts of the config's schema are made of. Imports nothing heavy."""

from __future__ import annotations

import re
import urllib.parse
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

SECRET = "secret"
"""Type of the errors whose value nobody should see."""
_PASSWORD = re.compile(r"://[^/?#]*:[^/?#]*@")
_KEYS = re.compile(r"secret|token|passw|credential|access_?key|account_?key|api_?key|^key$|^sas|^sig$", re.IGNORECASE)
"""Names in a URI's query whose value opens a store."""


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key, the value, the rule and the remedy."""


def secret_in(uri: str) -> str | None:
    """Why a path or URI cannot be taken that has a password or a key in it, ``None`` if it has none. The reason does not name the URI."""
    query = uri.partition("?")[2] if "://" in uri else ""
    if not _PASSWORD.search(uri) and not any(_KEYS.search(name) for name, _ in urllib.parse.parse_qsl(query, keep_blank_values=True)):
        return None
    return "the URI holds a password or a key, which the run, its jobs and logs would show; give it by a role of the machine or by environment"


def _without_secret(value: str) -> str:
    if (reason := secret_in(value)) is not None:
        raise PydanticCustomError(SECRET, "{reason}", {"reason": reason})
    return value


Place = Annotated[str, AfterValidator(_without_secret)]
"""A path or URI, or what may be one."""


class Strict(BaseModel):
    """Unknown keys are refused; a config never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
