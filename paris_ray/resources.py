"""The part of the config that says where training runs: what a worker asks for, and other clusters. Imports nothing heavy."""

from __future__ import annotations

import os
import urllib.parse
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from paris_ray.strict import SECRET, Place, Strict

HERE = "here"
"""The name of the cluster in which all stages run but the experts that say otherwise."""


class Machine(Strict):
    """What a training worker asks the cluster for."""

    cpus: Annotated[float, Field(gt=0)] = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0
    accelerator_type: str | None = None
    labels: dict[str, str] = Field(default={})
    custom: dict[str, float] = Field(default={})
    # Whose notices of an interruption to heed, on machines that may be taken away: a checkpoint is left where training is, and the node is drained.
    preemption: Literal["aws", "gcp", "azure"] | None = None
    # What an hour of it costs, in any currency, as long as all say the same; null: not known.
    price_per_hour: Annotated[float, Field(ge=0)] | None = None


def in_words(amounts: dict[str, float], accelerator_type: str | None, labels: dict[str, str]) -> str:
    """What is asked of a machine, for people."""
    parts = [f"{amount:g} {name}" for name, amount in amounts.items() if amount]
    selectors = [f"label {key} not {value[1:]}" if value.startswith("!") else f"label {key}={value}" for key, value in labels.items()]
    return ", ".join([*parts, *([accelerator_type] if accelerator_type else []), *selectors])


class Resources(Machine):
    """The machines of a training."""

    num_workers: Annotated[int, Field(ge=1)] = 1
    # Threads of one worker's matrix products on CPU; part of what "the same bits" means.
    threads: Annotated[int, Field(ge=1)] = 1
    max_failures: Annotated[int, Field(ge=-1)] = 3
    # After so many minutes without room for the workers this is said, and the fallback is asked for instead.
    wait_minutes: Annotated[float, Field(gt=0)] = 15.0
    # Another machine for each worker, such as one that is not taken away; what it does not say is as above, each label for itself ({}: no label).
    fallback: Machine | None = None

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("fallback"), dict):
            first, other = {key: value[key] for key in Machine.model_fields if key in value}, value["fallback"]
            if isinstance(labels := other.get("labels"), dict) and labels and isinstance(first.get("labels"), dict):
                other = {**other, "labels": {**first["labels"], **labels}}
            return {**value, "fallback": {**first, **other}}
        return value

    @model_validator(mode="after")
    def _same_device(self) -> Resources:
        if self.fallback is not None and (self.fallback.gpus > 0) != (self.gpus > 0):
            raise ValueError(
                f"fallback.gpus is {self.fallback.gpus:g} and gpus {self.gpus:g}; a training stays on one kind of device, so both are 0 or neither is"
            )
        return self

    def on_fallback(self) -> Resources:
        """These, with the fallback's machine. Raises ValueError when there is none."""
        if self.fallback is None:
            raise ValueError("there is no resources.fallback; leave out --fallback, or name one")
        return self.model_copy(update={**{key: getattr(self.fallback, key) for key in Machine.model_fields}, "fallback": None})


class ClusterConfig(Strict):
    """A Ray cluster that trains experts, beside the one where the other stages run."""

    # URL of its dashboard, which takes jobs.
    address: str
    # A local file with its token, read whenever it is used; null: it asks for none.
    token_file: str | None = None
    # The run directory as that cluster sees it, an absolute path or a URI; null: as it is seen here. It must be the same store.
    storage: Place | None = None
    # A container image that has this project, in which its jobs run; null: the project is sent along with them.
    image: str | None = None

    @field_validator("address")
    @classmethod
    def _url(cls, value: str) -> str:
        parts = urllib.parse.urlsplit(value)
        if parts.username is not None or parts.password is not None:
            raise PydanticCustomError(SECRET, "it holds a user's name or password, which would be written into the run; name a token_file instead")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("it must be the URL of a Ray dashboard: http://HOST:8265, or https://…")
        return value.rstrip("/")

    @field_validator("storage")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if value.startswith("file:///"):  # as a folder there calls itself
            value = urllib.parse.unquote(urllib.parse.urlsplit(value).path)
        if "://" in value:
            return value.rstrip("/")
        if not value.startswith("/"):
            raise ValueError("it must be a URI or an absolute path, as that cluster sees it")
        return os.path.normpath(value)
