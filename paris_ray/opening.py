"""Folders that somebody names: opened, or refused with what their store said and what to do. Imports nothing heavy."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from paris_ray.strict import ConfigError

if TYPE_CHECKING:
    from paris_ray.storage import Folder

_REMEDIES = (
    (r"protocol not known", "write s3://, gs://, abfs:// or another that pyarrow or fsspec knows, or a local path"),
    (r"^install |no module named|please install", "its file system is a package of its own"),
    (r"no_such_bucket|bucket.*not (found|exist)|notfound", "make the bucket first, and look at its name and region"),
    (
        r"permission|denied|forbidden|\b40[13]\b|unauthorized|credential|anonymous|access_key",
        "look at the credentials and their rights",
    ),
    (
        r"connect|resolve|timed? ?out|timeout|network|unreachable|name or service",
        "look at the network, the region, and AWS_ENDPOINT_URL if it is set",
    ),
)


def why(error: Exception) -> str:
    """What a store's library said, in a line, and what to do where that is known."""
    said = " ".join(str(error).split()) or type(error).__name__
    remedy = next((remedy for pattern, remedy in _REMEDIES if re.search(pattern, said.lower())), None)
    return f"{said}; {remedy}" if remedy else said


def open_folder(key: str, uri: str) -> Folder:
    """A folder that a setting names. Raises ConfigError, with the setting, when there is no such store or it does not open."""
    from paris_ray.storage import Folder

    try:
        return Folder(uri)
    except Exception as error:  # whatever a store's library raises is what there is to say
        raise ConfigError(f"{key}: {uri!r} cannot be opened: {why(error)}") from None


def absolute(uri: str) -> str:
    """The name of a folder as :class:`paris_ray.storage.Folder` has it, of which no store is asked."""
    from paris_ray.storage import Folder

    return uri.rstrip("/") if "://" in uri and not uri.startswith("file://") else Folder(uri).uri
