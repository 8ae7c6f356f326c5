"""What a job checks before it writes, deletes or starts anything."""

from __future__ import annotations

import os
from collections.abc import Sequence

from paris_ray import stages
from paris_ray.config import ConfigError, RunConfig, ScenesSource
from paris_ray.manifest import require
from paris_ray.opening import open_folder, why
from paris_ray.storage import Folder


class MissingParentError(FileNotFoundError):
    """A stage that this one reads from has not been run."""


def check(config: RunConfig, name: str, rebuild: Sequence[str] = ()) -> None:
    """Check what can be known of a stage before it starts.

    Args:
        config: the run's.
        name: the stage.
        rebuild: stages of which what is there would be deleted first.

    Raises:
        ConfigError: it would refuse these settings.
        MissingParentError: it cannot start yet; the message says what to run first.
    """
    if name == "embed":
        check_source(config)
        if name in rebuild:
            listed_rows(config)
    else:
        try:
            stages.stage(config, name)
        except FileNotFoundError as error:
            raise MissingParentError(str(error)) from None
    if name == "partition":
        check_clusters(config, rebuild)
        config.partition.check_backend()
    check_run_dir(config)


def check_parent(config: RunConfig, name: str) -> None:
    """Raise MissingParentError when a stage is not published."""
    try:
        require(stages.folder(config, name), name)
    except FileNotFoundError as error:
        raise MissingParentError(str(error)) from None


def check_run_dir(config: RunConfig) -> None:
    """Raise ConfigError when a local run directory cannot be made or written to."""
    run = Folder(config.run_dir)
    if not run.is_local:
        return
    try:
        os.makedirs(run.path, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir: {run.path} cannot be made ({error.strerror}); name a folder where you may write, --set run_dir=…") from None
    if not os.access(run.path, os.W_OK):
        raise ConfigError(f"run_dir: {run.path} cannot be written to; name a folder where you may write, --set run_dir=…")


def check_source(config: RunConfig, argument: str = "--set data.source.uri") -> None:
    """Raise ConfigError when the images are not there; ``argument`` says what they are."""
    source, remedy = config.data.source, f"name what holds the images and captions, {argument}=…"
    for key in ("uri", "images"):
        uri = getattr(source, key, None)
        if uri is None:
            continue
        folder = open_folder(f"data.source.{key}", uri)
        try:
            there, is_file = folder.exists(), folder.is_file()
        except Exception as error:  # whatever a store's library raises is what there is to say
            raise ConfigError(f"data.source.{key}: {uri!r} cannot be opened: {why(error)}; {remedy}") from None
        if not there:
            raise ConfigError(f"data.source.{key}: {folder.uri} does not exist; {remedy}")
        if is_file and (source.kind == "folder" or key == "images"):
            raise ConfigError(f"data.source.{key}: {folder.uri} is a file; name the folder that holds it and the others")


def listed_rows(config: RunConfig) -> int | None:
    """The rows that the source lists, of which no picture is read; ``None`` where only reading tells. Raises ConfigError when there is none."""
    from paris_ray.data.sources import open_source

    rows = [unit.rows for unit in open_source(config.data).units(config.data.rows_per_part)]
    known = [one for one in rows if one is not None]
    return sum(known) if len(known) == len(rows) else None


def expected_rows(config: RunConfig, listed: int) -> dict[str, int]:
    """How many rows will be for training and for validation, on average, of those that the source lists, if none is refused."""
    split, held_out = config.data.split, 1 - (1 - config.data.split.held_out_groups) * (1 - config.data.split.held_out_rows)
    watched = (1 - split.held_out_groups) * split.validation_rows
    if isinstance(config.data.source, ScenesSource):  # it says itself what is held out
        listed, held_out, watched = listed - config.data.source.unseen, 0.0, split.validation_rows
    return {"train": round(listed * (1 - held_out - watched)), "validation": round(listed * watched)}


def check_clusters(config: RunConfig, rebuild: Sequence[str] = ()) -> None:
    """Raise ConfigError when the corpus, if it is there and stays, is too small for the clusters that have yet to be made."""
    if "partition" in rebuild:
        config.check_none_added()
    elif stages.status(config, "partition").state == "valid":
        return
    corpus = stages.status(config, "embed")
    if corpus.state != "valid" or corpus.manifest is None or "embed" in rebuild:
        return
    train = corpus.manifest["counts"].get("splits", {}).get("train")
    if train is not None:
        config.check_train_rows(train)
