"""What the report knows of a run: read from its folders, with ``None`` or nothing where a stage has not run."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from paris_ray import stages
from paris_ray.config import RunConfig
from paris_ray.data.report.terms import terms
from paris_ray.data.schema import read_columns, read_labels
from paris_ray.evaluation.protocol import Decode, read_latents
from paris_ray.manifest import published
from paris_ray.storage import Folder

T = TypeVar("T")


class Facts:
    """A run directory, read lazily.

    Args:
        config: of the run.
    """

    def __init__(self, config: RunConfig):
        self.config = config
        self.run = Folder(config.run_dir)

    # -- stages -----------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def manifests(self) -> dict[str, dict[str, Any]]:
        """Manifests of the stages that are done, by name, in the order of the run."""
        named = {"encoders": self.run / "encoders"}
        named |= {name: stages.folder(self.config, name) for name in [*stages.names(self.config), "evaluate"]}
        found = {name: published(folder) for name, folder in named.items()}
        return {name: manifest for name, manifest in found.items() if manifest is not None}

    def seconds(self, name: str) -> float | None:
        """How long a stage took, ``None`` if it has not run or did not say."""
        value = self.manifests.get(name, {}).get("seconds")
        return None if value is None else float(value)

    def counts(self, name: str) -> dict[str, Any]:
        """The figures a stage published; empty if it has not run."""
        return dict(self.manifests.get(name, {}).get("counts") or {})

    @functools.cached_property
    def wall_seconds(self) -> float | None:
        """From the start of the first stage to the end of the last, whatever happened in between."""
        ends = [(datetime.datetime.fromisoformat(m["created"]).timestamp(), m.get("seconds") or 0.0) for m in self.manifests.values()]
        return max(end for end, _ in ends) - min(end - seconds for end, seconds in ends) if ends else None

    # -- data -------------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def rejected(self) -> dict[str, list[str]] | None:
        """Details of the refused rows by kind of reason (``kind: detail``), the most frequent kind first."""
        if "embed" not in self.manifests:
            return None
        found = _or_none(lambda: read_columns(self.run / "rejected", ["reason"]))
        reasons = [] if found is None else found["reason"].tolist()
        # Files that were lost must not make refused rows look like none.
        lost = self.counts("embed")["rejected"] - len(reasons)
        details: dict[str, list[str]] = {}
        for reason in [*reasons, *["reason lost: RUN/rejected is not whole"] * lost]:
            kind, _, detail = str(reason).partition(":")
            details.setdefault(kind, []).append(detail.strip())
        return dict(sorted(details.items(), key=lambda pair: -len(pair[1])))

    @functools.cached_property
    def corpus(self) -> dict[str, NDArray[Any]] | None:
        """Columns id, caption, split and group of the corpus."""
        return _or_none(lambda: read_columns(self.run / "corpus", ["id", "caption", "split", "group"])) if "embed" in self.manifests else None

    @functools.cached_property
    def labels(self) -> dict[str, int] | None:
        """The expert of each row, by id."""
        found = _or_none(lambda: read_labels(self.run / "clusters", ["id", "expert"]))
        return None if found is None else dict(zip(found["id"].to_pylist(), found["expert"].to_pylist(), strict=True))

    @functools.cached_property
    def clusters(self) -> dict[str, Any] | None:
        """``clusters.json``, with the ``sizes`` of today and the ``version`` that they are of."""
        if "partition" not in self.manifests:
            return None
        manifest = self.manifests["partition"]
        return {**(self.run / "clusters").read_json("clusters.json"), "sizes": manifest["counts"]["sizes"], "version": manifest["version"]}

    def contact_sheet(self, k: int) -> bytes | None:
        """The contact sheet of a cluster, a PNG."""
        return _or_none(lambda: (self.run / "clusters").read_bytes(f"contact-{k}.png"))

    @functools.cached_property
    def terms(self) -> list[list[str]]:
        """Words that set each cluster's captions apart."""
        if self.corpus is None or self.labels is None:
            return [[] for _ in range(self.config.num_experts)]
        known = [(caption, self.labels[name]) for name, caption in zip(self.corpus["id"], self.corpus["caption"], strict=True) if name in self.labels]
        expert = np.array([label for _, label in known], np.int32)
        found = terms([caption for caption, _ in known], expert, self.config.num_experts, 8)
        return [[word for word, _ in words] for words in found]

    # -- training, model, evaluation ----------------------------------------------------------------------------------------

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """Lines of a training stage's metrics; empty when there are none."""
        from paris_ray.training.checkpoint import read_metrics

        return _or_none(lambda: read_metrics(stages.folder(self.config, name))) or []

    @functools.cached_property
    def model(self) -> dict[str, Any] | None:
        """``paris.json``."""
        return _or_none(lambda: dict((self.run / "model").read_json("paris.json")))

    @functools.cached_property
    def table(self) -> dict[str, Any] | None:
        """``eval/table.json``."""
        return _or_none(lambda: dict((self.run / "eval").read_json("table.json")))

    def records(self, row: str) -> list[dict[str, Any]]:
        """How the pictures of a row of the table were judged; empty when the row was not run."""
        return _or_none(lambda: list((self.run / "eval").read_json(f"rows/{row}.json"))) or []

    def picture(self, file: str) -> NDArray[np.uint8]:
        """A generated picture, by the file its record names."""
        import io

        from PIL import Image

        with Image.open(io.BytesIO((self.run / "eval").read_bytes(file)), formats=["PNG"]) as opened:
            return np.asarray(opened.convert("RGB"))

    def originals(self, ids: list[str]) -> dict[str, NDArray[np.uint8]]:
        """Originals as the codec gives them back, by id; empty when there are no encoders."""
        unique = sorted(set(ids))
        if self.decode is None or not unique:
            return {}
        return dict(zip(unique, self.decode(read_latents(self.run / "corpus", unique)), strict=True))

    @functools.cached_property
    def decode(self) -> Decode | None:
        """The run's codec."""
        meta = _or_none(lambda: dict((self.run / "encoders").read_json("encoders.json")))
        return None if meta is None else load_decoder(self.run / "encoders", meta["codec"])


def load_decoder(folder: Folder, meta: dict[str, Any]) -> Decode:
    """Latents → pictures by the codec in a folder."""
    import torch

    from paris_ray.data.codec import load_codec

    codec = load_codec(folder.uri, meta)
    return lambda latents: np.asarray(codec.decode(torch.from_numpy(np.asarray(latents, np.float32))))


def _or_none(read: Callable[[], T]) -> T | None:
    """``None`` when the file is not there; any other error is one."""
    try:
        return read()
    except FileNotFoundError:
        return None
