"""Folders and files that somebody names: opened, or refused with what their store said and what to do. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import yaml

from paris_ray.config_errors import nearest
from paris_ray.strict import ConfigError, secret_in

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
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    except Exception as error:  # whatever a store's library raises is what there is to say
        raise ConfigError(f"{key}: {uri!r} cannot be opened: {why(error)}") from None


@contextlib.contextmanager
def heard(key: str, uri: str) -> Iterator[None]:
    """While a job looks at a folder of a store before it does anything: what the store says is a ConfigError; that a file is missing is not."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if "://" not in uri:
            raise
        raise ConfigError(f"{key}: {uri} cannot be read: {why(error)}") from None


def absolute(uri: str) -> str:
    """The name of a folder as :class:`paris_ray.storage.Folder` has it, of which no store is asked."""
    from paris_ray.storage import Folder

    return uri.rstrip("/") if "://" in uri and not uri.startswith("file://") else Folder(uri).uri


def read_yaml(source: str, key: str, presets: Iterable[str] = ()) -> dict[str, Any]:
    """The keys and values of a YAML file, local or in a store.

    Args:
        source: its path or URI.
        key: the setting or argument that names it.
        presets: what could have been named in its place.

    Raises:
        ConfigError: it is not there, cannot be read, or holds something else.
    """
    if (reason := secret_in(source)) is not None:
        raise ConfigError(f"{key}: {reason}")
    parent, name = os.path.split(source)
    folder = open_folder(key, parent or ".")
    try:
        text = folder.read_bytes(name)
    except (FileNotFoundError, IsADirectoryError) as error:
        if "://" in source:
            raise ConfigError(f"{key}: {source!r} does not exist; look at the names of bucket and file") from error
        if not presets:
            raise ConfigError(f"{key}: {source!r} is not a readable file") from error
        hint = nearest(source, presets) if not parent else ""
        raise ConfigError(f"{key}: {source!r} is neither a preset ({', '.join(presets)}) nor a readable file.{hint}") from error
    except Exception as error:  # whatever a store's library raises is what there is to say
        raise ConfigError(f"{key}: {source!r} cannot be read: {why(error)}") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: {source} is not valid YAML: {_where(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{key}: {source} must hold keys and values, not {type(tree).__name__}")
    return tree


def _where(error: yaml.YAMLError) -> str:
    """An error of YAML in a line."""
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}" if mark else " ".join(str(error).split())  # type: ignore[attr-defined]
