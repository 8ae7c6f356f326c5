"""A corpus of three well-separated kinds, published as the stage before would, without a picture or an encoder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paris_ray import config as configs
from paris_ray import stages
from paris_ray.config import RunConfig
from paris_ray.data import partition, schema
from paris_ray.storage import Folder

WIDTH, ALL = 16, 300
ENCODERS: dict[str, Any] = {
    "image_size": 16,
    "text": {"kind": "minilm", "max_length": 4, "width": 6},
    "codec": {"kind": "patch_pca", "channels": 3, "latent_size": 4, "downsampling": 4},
    "embedding": {"kind": "efficientnet_lite0", "width": WIDTH},
}
WORDS = ["red fox", "green tree", "blue car"]


def columns(store_text: str, distinct: bool) -> dict[str, Any]:
    """The columns of all rows."""
    n, g = ALL, np.random.default_rng(5)
    kind = g.integers(0, 3, n)
    centres = g.standard_normal((3, WIDTH))
    embedding = (centres[kind] + 0.25 * g.standard_normal((n, WIDTH)) * distinct) * g.uniform(0.5, 2, (n, 1))
    if not distinct:
        embedding = centres[kind]
    text = g.standard_normal((n, 4, 6)).astype(np.float16) if store_text == "states" else g.integers(0, 99, (n, 4)).astype(np.int32)
    return {
        "id": np.array([f"img-{i:04d}" for i in g.permutation(n)], object),
        "caption": np.array([f"{WORDS[k]} number {i}" for i, k in enumerate(kind)], object),
        "text" if store_text == "states" else "token_ids": text,
        "text_len": g.integers(1, 5, n),
        "latent": g.standard_normal((n, 3, 4, 4)).astype(np.float16),
        "embedding": embedding.astype(np.float16),
        "split": g.choice(["train", "validation", "held_out"], n, p=[0.8, 0.1, 0.1]).astype(object),
        "group": np.array([f"g{i // 2}" for i in range(n)], object),
        "phash": np.arange(n),
        "caption_cut": np.zeros(n, bool),
        "source": np.array([f"s{i}" for i in range(n)], object),
        "width": np.full(n, 16),
        "height": np.full(n, 16),
    }


def write_parts(run: Folder, content: dict[str, Any], order: np.ndarray, per_part: int, first: int = 0) -> None:
    """Rows in an order, as part files from a number on."""
    kind = schema.corpus_schema(ENCODERS, "states" if "text" in content else "token_ids")
    for number, low in enumerate(range(0, len(order), per_part), first):
        own = {name: values[order[low : low + per_part]] for name, values in content.items()}
        rows = {name: list(values) if values.dtype == object else values for name, values in own.items()}
        schema.write_table(run / "corpus", schema.part_name(number), schema.table(kind, rows))


def make_corpus(
    path: Path,
    sets: tuple[str, ...] = (),
    store_text: str = "states",
    distinct: bool = True,
    rows: int = 240,
    per_part: int = 70,
    shuffled: bool = False,
) -> RunConfig:
    """A run with the first rows embedded."""
    one = configs.load("tiny", [f"run_dir={path}", f"data.store_text={store_text}", *sets])
    run = Folder(path)
    encoders = stages.stage(one, "encoders")
    encoders.begin()
    run.write_json("encoders/encoders.json", ENCODERS)
    encoders.publish()
    embed = stages.stage(one, "embed")
    embed.begin()
    order = np.random.default_rng(6).permutation(rows) if shuffled else np.arange(rows)
    write_parts(run, columns(store_text, distinct), order, per_part)
    embed.publish()
    return one


def publish_more(one: RunConfig, rows: Iterable[int], first: int) -> None:
    """Further rows in the corpus, as a new version of it."""
    run = Folder(one.run_dir)
    write_parts(run, columns("states", True), np.array(list(rows)), 25, first)
    embed = stages.stage(one, "embed")
    embed.publish(after=embed.status().manifest)


def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the report out: drawing needs Ray and a codec, and has its own tests in test_cluster_report.py."""

    def write(config: RunConfig, sheets: object) -> None:
        (Folder(config.run_dir) / "clusters").write_bytes("report.html", b"")

    monkeypatch.setattr(partition, "draw_sheets", lambda config: None)
    monkeypatch.setattr(partition, "write_report", write)


def shard_bytes(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted((path / "shards").rglob("*.parquet"))}
