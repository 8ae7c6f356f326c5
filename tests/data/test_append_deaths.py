"""An append that dies at any point: nobody reads what is not published, nothing published changes, and the same command goes on to the same bytes."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs import append as append_job
from jobs import cli
from paris_ray import config as configs
from paris_ray import stages
from paris_ray.config import FolderSource, RunConfig
from paris_ray.data import append, duplicates, embed, partition, schema
from paris_ray.data.fit import Index
from paris_ray.data.splits import read_copies, read_splits
from paris_ray.manifest import StaleError, published
from paris_ray.storage import Folder
from paris_ray.training.shard import read_rows

from . import light
from .corpora import contents, write_folder
from .fabricated_corpus import make_corpus, publish_more, shard_bytes, without_pictures
from .in_process import in_process  # noqa: F401
from .test_parquet import png


class Death(OSError):
    """Of the driver, at a point of the test's choice."""


def dying(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool]) -> None:
    """A function that dies instead of a call for which ``when`` is true."""
    real = getattr(owner, name)

    def call(*args: Any, **named: Any) -> Any:
        if when(*args):
            raise Death("disk full")
        return real(*args, **named)

    monkeypatch.setattr(owner, name, call)


def nth(n: int) -> Callable[..., bool]:
    """True at the n-th call."""
    calls = iter(range(n + 100))
    return lambda *_: next(calls) == n


def blemished(image: bytes) -> bytes:
    """Another picture that looks like it: a few bits of its hash differ."""
    with Image.open(io.BytesIO(image)) as opened:
        pixels = np.asarray(opened.convert("RGB")).astype(int)
    sink = io.BytesIO()
    pixels[:8, :8] += 12
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: None) -> tuple[Callable[[str], RunConfig], FolderSource]:  # noqa: F811
    """Copies of a run that has its shards, and a source to append: 20 new rows in 4 parts, 4 old ones, one twice, one broken, 3 look-alikes."""
    monkeypatch.setattr(embed, "EncodePart", light.LightEncode)
    monkeypatch.setattr(embed, "_save_frozen", light.save_frozen)
    without_pictures(monkeypatch)
    rows = [(f"{i:03d}.png", png(i, (24, 20)), f"picture {i}") for i in range(44)]
    first = write_folder(tmp_path / "first", rows[:24])
    more = [(f"m{name}", image, caption) for name, image, caption in (*rows[24:], rows[3], rows[17], *rows[5:7])]
    more.append(("z.png", *rows[40][1:]))
    more += [(f"k{name}", blemished(image), caption) for name, image, caption in (rows[2], rows[9], rows[30])]
    source = write_folder(tmp_path / "more", [*more, ("broken.png", b"no picture", "a caption")])

    def settings(run: Path) -> RunConfig:
        return light.light_config(run, f"{{kind: folder, uri: {first}}}", "partition.fine=6")

    one = settings(tmp_path / "base")
    embed.embed(one)
    partition.partition(one)

    def copy(name: str) -> RunConfig:
        shutil.copytree(tmp_path / "base", tmp_path / name)
        return settings(tmp_path / name)

    return copy, FolderSource(kind="folder", uri=str(source))


def seen(config: RunConfig) -> dict[str, Any]:
    """What readers of the corpus find, and the run's published bytes."""
    run = Folder(config.run_dir)
    index = Index.read(run / "corpus")
    files = [file["name"] for file in (published(run / "corpus") or {})["files"]]
    return {
        "ids": index.ids.to_pylist(),
        "splits": index.split.tolist(),
        "columns": schema.read_columns(run / "corpus", ["id"])["id"].tolist(),
        "by_part": {name: codes.tolist() for name, codes in read_splits(run / "corpus").items()},
        "copies": read_copies(run / "corpus"),
        "rejected": schema.read_columns(run / "rejected", ["source"])["source"].tolist() if schema.parts(run / "rejected") else [],
        "files": {name: (run / "corpus").read_bytes(name) for name in files},
    }


def event(config: RunConfig) -> dict[str, Any]:
    return dict(json.loads((Path(config.run_dir) / "events/append.json").read_text()))


POINTS: dict[str, tuple[Any, str, Callable[[], Callable[..., bool]]]] = {
    "encoding": (light.LightEncode, "__call__", lambda: nth(2)),
    "before dropping": (duplicates, "drop", lambda: nth(0)),
    "between two drops": (duplicates, "drop", lambda: nth(1)),
    "between rejects and a drop": (schema.PartWriter, "__exit__", lambda: nth(4)),
    "before near-duplicates": (duplicates, "join_near_duplicates", lambda: nth(0)),
    "after near-duplicates": (stages.Stage, "publish", lambda: lambda stage, *_: stage.name == "rejected"),
    "before publishing": (stages.Stage, "publish", lambda: lambda stage, *_: stage.name == "embed"),
}


def test_a_corpus_that_was_appended_to_in_pieces(base: tuple[Callable[[str], RunConfig], FolderSource], tmp_path: Path) -> None:
    copy, source = base
    whole = copy("whole")
    before = seen(whole)
    assert append.append_corpus(whole, source) == 23
    manifest = published(Folder(whole.run_dir) / "corpus") or {}
    assert manifest["counts"]["reasons"] == {"duplicate": 5, "not an image": 1}
    assert manifest["counts"]["near_duplicates"] == 4
    after = seen(whole)
    assert after["files"].items() > before["files"].items()
    for number, (point, (owner, name, when)) in enumerate(POINTS.items()):
        one = copy(f"run{number}")
        with pytest.MonkeyPatch.context() as patch:
            dying(patch, owner, name, when())
            with pytest.raises(Death):
                append.append_corpus(one, source)
        assert (event(one)["state"], event(one)["message"]) == ("failed", "Death: disk full"), point
        # Nothing of it is read, nothing that was published has changed, and no stage goes on from it.
        rejected = after["rejected"] if point == "before publishing" else []
        assert seen(one) == {**before, "rejected": rejected}, point
        assert stages.status(one, "embed").state == "valid", point
        for stage in (embed.embed, partition.partition, append.append_partition):
            with pytest.raises(StaleError, match="corpus is half appended") as refused:
                stage(one)
            command = shlex.split(str(refused.value).split("again: ")[1])
            assert command[:-1] == ["python", "-m", "jobs.append", "--config", f"{one.run_dir}/config.yaml", "--source"]
            assert configs.load("tiny", [f"data.source={command[-1]}"]).data.source == source
        assert append.append_corpus(one, source) == 23, point
        for folder in ("corpus", "rejected"):
            assert contents(Path(one.run_dir) / folder) == contents(Path(whole.run_dir) / folder), point
        found = published(Folder(one.run_dir) / "corpus") or {}
        assert {**found, "created": 0, "seconds": 0} == {**manifest, "created": 0, "seconds": 0}, point
        assert append.append_corpus(one, source) == 0
        assert event(one)["state"] == "done"
        assert append.append_partition(one) == 23, point
        assert schema.read_labels(Folder(one.run_dir) / "clusters", ["id"])["id"].to_pylist() == after["ids"]


def test_the_job_says_who_got_the_rows(
    base: tuple[Callable[[str], RunConfig], FolderSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, source = base
    one = copy("said")
    monkeypatch.setattr(cli, "connect", lambda: None)
    (tmp_path / "said/config.yaml").write_text(configs.dump(one))
    before = stages.cluster_sizes(one)
    for k in (0, 1, 2):
        expert = stages.stage(one, f"expert-{k}")
        expert.begin()
        expert.publish()
    capsys.readouterr()
    job = ["--config", f"{tmp_path}/said/config.yaml", "--source", f"{{kind: folder, uri: {source.uri}}}"]
    assert append_job.main([*job, "--set", "partition.max_share=1.01"]) == 2  # the clusters were made without
    assert append_job.main(job) == 0
    said = capsys.readouterr().out
    assert "6 rows refused" in said
    assert re.search(r"/rejected: duplicate \(5\), \w[\w ]+ \(1\)\n", said)
    table = schema.read_labels(Folder(tmp_path / "said/clusters"), ["expert", "split"]).to_pydict()
    now = [sum(e == k and s == "train" for e, s in zip(table["expert"], table["split"], strict=True)) for k in range(3)]
    gained = [b - a for a, b in zip(before, now, strict=True)]
    assert f"training rows: expert 0 +{gained[0]}, expert 1 +{gained[1]}, expert 2 +{gained[2]}\n" in said
    for k in range(3):
        assert (f"--rebuild expert-{k}" in said) == (gained[k] > 0)
    free = one.model_copy(update={"partition": one.partition.model_copy(update={"max_share": None})})
    append_job.print_shares(free, [10, 10, 10], [10, 10, 100])
    assert "expert 2 now has 2.50 × an equal share, which is much" in capsys.readouterr().out
    capped = one.model_copy(update={"partition": one.partition.model_copy(update={"max_share": 1.1})})
    append_job.print_shares(capped, [10, 10, 10], [13, 10, 10])
    out = capsys.readouterr().out
    assert "expert 0 now has 1.18 × an equal share, partition.max_share is 1.1" in out
    assert "expert 1 now" not in out


def test_an_append_that_died_when_all_was_published(base: tuple[Callable[[str], RunConfig], FolderSource]) -> None:
    copy, source = base
    one = copy("run")
    with pytest.MonkeyPatch.context() as patch:
        dying(patch, Folder, "delete", lambda folder, name: name == "_append.json")
        with pytest.raises(Death):
            append.append_corpus(one, source)
    with pytest.raises(StaleError, match="half appended"):
        append.append_partition(one)
    assert append.append_corpus(one, source) == 0
    assert append.append_partition(one) == 23


def test_rows_of_one_source_do_not_go_where_another_appends(base: tuple[Callable[[str], RunConfig], FolderSource], tmp_path: Path) -> None:
    copy, source = base
    one = copy("run")
    assert append.append_corpus(one, source) == 23  # and it dies: to whom they were to go is not written anywhere
    manifest = published(Folder(one.run_dir) / "corpus")
    rows = [(f"{i}.png", png(i, (24, 20)), f"other {i}") for i in range(90, 95)]
    other = FolderSource(kind="folder", uri=str(write_folder(tmp_path / "other", rows)))
    with pytest.raises(StaleError, match=r"corpus has 23 rows of an earlier append .*: python -m jobs.append --config \S+/run/config.yaml$"):
        append.append_corpus(one, other)
    assert published(Folder(one.run_dir) / "corpus") == manifest
    assert append.append_corpus(one, source) == 0
    assert append.append_partition(one) == 23
    assert append.append_corpus(one, other) == 5
    with pytest.raises(StaleError, match="corpus has 5 rows of an earlier append"):  # nor are they the first one's, although that is in the corpus
        append.append_corpus(one, source)
    assert append.append_corpus(one, other) == 0
    assert append.append_partition(append.with_another_expert(one), 3) == 5


@pytest.mark.parametrize("point", ["before near-duplicates", "before publishing"])
def test_an_append_may_be_given_up(base: tuple[Callable[[str], RunConfig], FolderSource], tmp_path: Path, point: str) -> None:
    copy, source = base
    one, whole = copy("run"), copy("whole")
    owner, name, when = POINTS[point]
    with pytest.MonkeyPatch.context() as patch:
        dying(patch, owner, name, when())
        with pytest.raises(Death):
            append.append_corpus(one, source)
    rows = [(f"{i}.png", png(i, (24, 20)), f"other {i}") for i in range(90, 95)]
    other = FolderSource(kind="folder", uri=str(write_folder(tmp_path / "other", rows)))
    with pytest.raises(StaleError, match=r"has half of .*/more.* or delete _append.json there to give it up"):
        append.append_corpus(one, other)
    (Path(one.run_dir) / "corpus/_append.json").unlink()
    assert append.append_corpus(one, other) == append.append_corpus(whole, other) == 5
    for folder in ("corpus", "rejected"):
        assert contents(Path(one.run_dir) / folder) == contents(Path(whole.run_dir) / folder)


def trained_on(config: RunConfig, experts: list[int]) -> tuple[list[str], list[str], bytes]:
    """Ids and latents that training reads."""
    train, validation = read_rows(Folder(config.run_dir), experts, "states")
    return train.ids, validation.ids, train.latents.numpy().tobytes()


def test_shards_that_were_appended_to_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)
    whole, one = (make_corpus(tmp_path / name) for name in ("whole", "run"))
    for run in (whole, one):
        partition.partition(run)
        publish_more(run, range(240, 300), 4)
    clusters = Folder(one.run_dir) / "clusters"
    before, labels = [trained_on(one, [k]) for k in range(3)], schema.read_labels(clusters, ["id", "expert"])
    assert append.append_partition(whole) == 60
    after = [trained_on(whole, [k]) for k in range(3)]
    assert all(len(more[0]) > len(less[0]) for less, more in zip(before, after, strict=True))
    points: list[tuple[Any, str, Callable[..., bool], int]] = [
        (append, "_label", nth(0), 0),
        (schema, "write_table", nth(1), 0),  # one expert's file is there
        (stages.Stage, "publish", lambda stage, *_: stage.name == "shard-0", 0),  # all are
        (stages.Stage, "publish", lambda stage, *_: stage.name == "shard-1", 1),
        (schema, "write_table", lambda folder, *_: "clusters" in folder.uri, 3),
        (stages.Stage, "publish", lambda stage, *_: stage.name == "partition", 3),
    ]
    for owner, name, when, done in points:
        with pytest.MonkeyPatch.context() as patch:
            dying(patch, owner, name, when)
            with pytest.raises(Death):
                append.append_partition(one)
        assert (event(one)["state"], event(one)["message"]) == ("failed", "Death: disk full")
        assert [trained_on(one, [k]) for k in range(3)] == [*after[:done], *before[done:]]
        assert schema.read_labels(clusters, ["id", "expert"]).equals(labels)
        assert {stages.status(one, stage).state for stage in ("partition", "shard-0", "shard-1", "shard-2")} == {"valid"}
        with pytest.raises(StaleError, match=r"clusters is half appended; .*: python -m jobs.append --config \S+/run/config.yaml$"):
            partition.partition(one)
        if done == 1:
            with pytest.raises(StaleError, match=r"shards are of different versions of the corpus: .*jobs.append"):
                trained_on(one, [0, 1, 2])
    # A second append would be cut into the files of the first.
    more = write_folder(tmp_path / "more", [("a.png", png(1), "a caption")])
    with pytest.raises(StaleError, match="clusters is half appended"):
        append.append_corpus(one, FolderSource(uri=str(more)))
    assert append.append_partition(one) == 60
    assert shard_bytes(tmp_path / "run") == shard_bytes(tmp_path / "whole")
    for stage in ("partition", "shard-0", "shard-1", "shard-2"):
        made, wanted = (stages.stage(run, stage).status().manifest or {} for run in (one, whole))
        assert made["fingerprint"] == wanted["fingerprint"]
        assert made["version"] == wanted["version"] == 2
    with pytest.MonkeyPatch.context() as patch:
        publish_more(one, range(200, 210), 7)
        dying(patch, Folder, "delete", nth(0))
        with pytest.raises(Death):
            append.append_partition(one)
    assert append.append_partition(one) == 0
    partition.partition(one)


def test_a_shard_that_is_not_what_its_manifest_counts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)
    one = make_corpus(tmp_path)
    partition.partition(one)
    shard, (name, *_) = Folder(tmp_path) / "shards/expert=1", schema.parts(Folder(tmp_path) / "shards/expert=1")
    table = schema.read_table(shard, name)
    schema.write_table(shard, name, table.slice(2))
    with pytest.raises(StaleError, match=rf"expert=1 holds {len(table) - 2} rows, its manifest counts {len(table)}; .*--rebuild partition"):
        trained_on(one, [1])
