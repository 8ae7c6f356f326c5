"""Appended rows: labelled by the centroids there are, added to the shards, what was there untouched and still valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from jobs import append as append_job
from jobs import cli, run_all
from paris_ray import config as configs
from paris_ray import stages
from paris_ray.config import ConfigError, RunConfig
from paris_ray.data import append, embed, partition, schema
from paris_ray.data.duplicates import NEAR
from paris_ray.data.fit import Model
from paris_ray.manifest import StaleError
from paris_ray.storage import Folder
from paris_ray.training.shard import read_rows

from .fabricated_corpus import columns, make_corpus, publish_more, without_pictures, write_parts


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)


def manifests(one: RunConfig) -> dict[str, dict[str, Any]]:
    found = {name: stages.stage(one, name).status().manifest for name in ("embed", "partition", *(f"shard-{k}" for k in range(3)))}
    return {name: manifest for name, manifest in found.items() if manifest is not None}


@pytest.mark.parametrize("method", ["kmeans", "random"])
def test_rows_are_appended_and_nothing_else_changes(tmp_path: Path, method: str) -> None:
    one = make_corpus(tmp_path, (f"partition.method={method}",))
    partition.partition(one)
    run = Folder(tmp_path)
    expert = stages.stage(one, "expert-1")
    expert.begin()
    expert.folder.write_bytes("weights", b"trained")
    expert.publish()
    before, files = manifests(one), {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name[0] != "_"}
    old = schema.read_labels(run / "clusters", ["id", "fine", "expert", "distance", "split"])

    publish_more(one, range(240, 270), 4)
    assert stages.status(one, "partition").notes == ("made from version 1 of 2 of corpus",)
    assert append.append_partition(one) == 30
    assert append.append_partition(one) == 0
    publish_more(one, range(270, 300), 6)
    assert append.append_partition(one) == 30

    kept = {p: p.read_bytes() for p in files if p.parent.name != "events"}
    assert kept == {p: content for p, content in files.items() if p in kept}
    labels = schema.read_labels(run / "clusters", ["id", "fine", "expert", "distance", "split"])
    assert labels.slice(0, 240).equals(old)
    corpus = schema.read_columns(run / "corpus", ["id", "split", "embedding", "latent", "group"])
    assert labels["id"].to_pylist() == corpus["id"].tolist()
    model, fine = Model.read(run / "clusters"), labels["fine"].to_numpy()
    x = corpus["embedding"].astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    if method == "kmeans":
        assert (fine == ((x[:, None] - model.fine[None]) ** 2).sum(-1).argmin(1)).all()
    else:
        assert all(len(set(fine[corpus["group"] == group])) == 1 for group in set(corpus["group"]))
    own = model.fine_to_coarse[fine]
    assert (labels["expert"].to_numpy() == own).all()
    np.testing.assert_allclose(labels["distance"], ((x - model.coarse[own]) ** 2).sum(1), atol=1e-5)

    after = manifests(one)
    seen: list[str] = []
    for k in range(3):
        shard = schema.read_columns(run / "shards" / f"expert={k}", ["id", "fine", "latent", "split"])
        rows = [corpus["id"].tolist().index(i) for i in shard["id"]]
        assert (own[rows] == k).all()
        assert (shard["fine"] == fine[rows]).all()
        assert (shard["latent"] == corpus["latent"][rows]).all()
        assert (shard["split"] == corpus["split"][rows]).all()
        assert after[f"shard-{k}"]["counts"]["rows"] == len(rows)
        assert {file["name"] for file in after[f"shard-{k}"]["files"]} == {p.name for p in (tmp_path / f"shards/expert={k}").glob("part-*")}
        seen += shard["id"].tolist()
    assert sorted(seen) == sorted(corpus["id"][corpus["split"] != "held_out"])
    for name, manifest in after.items():
        assert manifest["version"] == 3
        assert manifest["previous"][0] == before[name]["fingerprint"]
    assert after["partition"]["counts"]["rows"] == 300
    assert after["partition"]["counts"]["sizes"] == np.bincount(own[corpus["split"] == "train"]).tolist()
    assert stages.cluster_sizes(one) == after["partition"]["counts"]["sizes"] != (run / "clusters").read_json("clusters.json")["sizes"]
    assert stages.status(one, "expert-1").state == "valid"
    assert stages.status(one, "expert-1").notes == ("made from version 1 of 3 of shard",)
    assert all(stages.status(one, name).notes == () for name in after)


def test_an_expert_is_added_and_the_others_stay_as_they_are(tmp_path: Path) -> None:
    one = make_corpus(tmp_path)
    partition.partition(one)
    run = Folder(tmp_path)
    for name in ("expert-0", "expert-1", "expert-2", "router"):
        stage = stages.stage(one, name)
        stage.begin()
        for file in ("diffusion_pytorch_model.safetensors", "pytorch_model.safetensors", "config.json"):
            stage.folder.write_bytes(f"export/{file}", name.encode())
        stage.publish(result="export/")
    prints = [stages.status(one, f"expert-{k}").manifest for k in range(3)]
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name[0] != "_" and "events" not in p.parts}
    publish_more(one, range(240, 300), 4)
    more = append.with_another_expert(one)
    assert (more.num_experts, more.num_clusters) == (4, 3)
    assert more.experts[3] == more.expert
    assert append.append_partition(more, 3) == 60
    append.keep_router(one)
    assert append.append_partition(more, 3) == 0
    assert {p: p.read_bytes() for p in files} == files
    corpus = schema.read_columns(run / "corpus", ["id", "split"])
    new = schema.read_columns(run / "shards" / "expert=3", ["id", "split"])
    wanted = {(i, split) for i, split in zip(corpus["id"][240:], corpus["split"][240:], strict=True) if split != "held_out"}
    assert set(zip(new["id"], new["split"], strict=True)) == wanted
    assert stages.cluster_sizes(more) == [*stages.require(run / "clusters", "")["counts"]["sizes"][:3], sum(split == "train" for _, split in wanted)]
    assert sum(stages.cluster_sizes(more)) == (corpus["split"] == "train").sum()
    assert [stages.status(more, f"expert-{k}").manifest for k in range(3)] == prints
    states = {name: stages.status(more, name).state for name in ("partition", "expert-0", "expert-1", "expert-2", "expert-3", "router")}
    assert states == {"partition": "valid", "expert-0": "valid", "expert-1": "valid", "expert-2": "valid", "expert-3": "absent", "router": "stale"}
    assert more.router.init_from == f"{tmp_path}/routers/3"
    assert (tmp_path / "routers" / "3" / "pytorch_model.safetensors").read_bytes() == b"router"
    # Rows that come later go to their clusters again, and clusters are not made anew without the added expert's rows being missed.
    partition.partition(more)
    (tmp_path / "shards" / "expert=3" / "_manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"partition.added is 1: .*partition.added=0 and pass --rebuild partition"):
        partition.partition(more)


def test_an_expert_that_is_half_added_is_finished_as_it_was_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_corpus(tmp_path)
    partition.partition(one)
    publish_more(one, range(240, 300), 4)
    more = append.with_another_expert(one)
    assert more.router.init_from is None  # there is none yet

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(append, "shard_counts", killed)
        with pytest.raises(KeyboardInterrupt):
            append.append_partition(more, 3)
    with pytest.raises(StaleError, match=r"is half appended.*--source … --new-expert"):
        append.append_partition(one)
    assert append.append_partition(more, 3) == 60
    assert stages.status(more, "partition").state == stages.status(more, "shard-3").state == "valid"


def test_what_a_run_with_an_expert_more_refuses_is_refused_before_the_corpus_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what is printed at the end is what ``run_all`` takes."""
    one = make_corpus(tmp_path)
    partition.partition(one)
    (tmp_path / "config.yaml").write_text(configs.dump(one))
    grown: list[str] = []

    def grow(config: RunConfig, source: object) -> int:
        grown.append(config.run_dir)
        publish_more(config, range(240, 300), 4)
        return 60

    monkeypatch.setattr(append, "append_corpus", grow)
    monkeypatch.setattr(cli, "connect", lambda: None)
    (tmp_path / "pictures").mkdir()
    job = ["--config", str(tmp_path / "config.yaml"), "--source", f"{{kind: folder, uri: {tmp_path}/pictures}}", "--new-expert"]
    trained = ("expert-0", "expert-1", "expert-2", "router", "control_router")
    for name in trained:
        stages.stage(one, name).begin()
    stages.folder(one, "expert-0").write_bytes("checkpoints/images-000000008/state.json", b"{}")
    assert append_job.main(job) == 2
    assert "expert-0, expert-1, expert-2 are half trained" in capsys.readouterr().err
    assert append_job.main(job[:-1]) == 2  # rows for the experts that there are change the router's, too
    assert "expert-0, expert-1, expert-2, router, control_router are half trained" in capsys.readouterr().err
    for name in (*trained, "assemble", "evaluate"):
        stage = stages.stage(one, name)
        stage.begin()
        for file in ("diffusion_pytorch_model.safetensors", "pytorch_model.safetensors", "config.json"):
            stage.folder.write_bytes(f"export/{file}", name.encode())
        stage.publish(result="export/")
    weights = tmp_path / "experts/1/export/config.json"
    weights.write_bytes(b"damaged")
    assert append_job.main(job) == 2
    assert "expert-1 (damaged):" in capsys.readouterr().err
    weights.write_bytes(b"expert-1")
    assert grown == []
    assert append_job.main(job) == 0
    assert grown == [str(tmp_path)]
    command = capsys.readouterr().out.splitlines()[-1].split("jobs.run_all ")[1].split()
    assert command[:2] == ["--config", str(tmp_path / "config.yaml")]
    assert command[2::2] == ["--rebuild"] * 4
    run_all.prepare(configs.load(command[1]), command[3::2])


def test_configs_that_leave_room_for_an_expert_more(tmp_path: Path) -> None:
    """As many fine clusters as experts, and replicas by name."""
    sets = ["experts=3", "partition.fine=3", "serve.placement=[[0, 2], [1]]"]
    more = append.with_another_expert(configs.load("tiny", [f"run_dir={tmp_path}", *sets]))
    assert (more.num_experts, more.partition.fine) == (4, 3)
    assert more.serve.placement == ((0, 2), (1,), (3,))
    assert append.with_another_expert(more).num_clusters == 3


def test_unused_rows_are_labelled_and_in_no_shard(tmp_path: Path) -> None:
    one = make_corpus(tmp_path)
    partition.partition(one)
    run, ids = Folder(tmp_path), columns("states", True)["id"]
    new = ids[[240, 251]]
    near = {"id": new, "group": ["a", "b"], "split": ["unused", "unused"], "of": new, "part": [4, 4], "row": [0, 11]}
    schema.write_table(run / "corpus", "near_duplicates-000002.parquet", pa.table(near, NEAR))
    publish_more(one, range(240, 270), 4)
    append.append_partition(one)
    labels = schema.read_labels(run / "clusters", ["id", "fine", "expert", "split"])
    unused = pc.equal(labels["split"], "unused")
    assert set(labels["id"].filter(unused).to_pylist()) == set(new)
    assert all(partition.shard_counts(labels, k) == partition.shard_counts(labels.filter(pc.invert(unused)), k) for k in range(3))
    shards = [schema.read_columns(run / "shards" / f"expert={k}", ["id", "split"]) for k in range(3)]
    assert set(new).isdisjoint(np.concatenate([shard["id"] for shard in shards]))
    assert {split for shard in shards for split in shard["split"]} == {"train", "validation"}
    found = read_rows(run, range(3), "states")  # and counts are those of the files
    assert sum(map(len, found)) == sum(len(shard["id"]) for shard in shards)


def test_another_corpus_is_not_appended(tmp_path: Path) -> None:
    one = make_corpus(tmp_path)
    partition.partition(one)
    run, embed = Folder(tmp_path), stages.stage(one, "embed")
    write_parts(run, columns("states", True), np.arange(300)[::-1], 70)
    embed.publish()
    with pytest.raises(StaleError, match=r"append: .*clusters was made from other inputs:\n  - parents.corpus"):
        append.append_partition(one)


def test_pictures_are_appended_by_the_job(tmp_path: Path, ray_local: None, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["data.source.emoji=16", "data.rows_per_part=10", "data.split.validation_rows=0.1", "data.max_encoders=1", "partition.fine=6"]
    one = configs.load("tiny", [f"run_dir={tmp_path}", *base])
    run = Folder(tmp_path)
    embed.embed(one)
    partition.partition(one)
    (tmp_path / "config.yaml").write_text(configs.dump(one))
    before = {name: manifest["counts"]["rows"] for name, manifest in manifests(one).items()}
    assert before["embed"] == 32
    # The same pictures on white, which are refused, and on a ground that is new.
    job = ["--config", str(tmp_path / "config.yaml"), "--source", "{kind: openmoji, emoji: 16, grounds: [white, orange]}"]
    assert append_job.main(job) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        f"16 rows appended to {tmp_path}/corpus",
        f"16 rows refused, each with its reason in {tmp_path}/rejected: duplicate (16)",
        f"16 rows appended to {tmp_path}/clusters and shards",
    ]
    assert lines[3].startswith("training rows: expert 0 +")
    reasons = [reason for name in schema.parts(run / "rejected") for reason in schema.read_table(run / "rejected", name)["reason"].to_pylist()]
    assert len(reasons) == 16
    assert all(reason.startswith("duplicate: of ") for reason in reasons)
    rows = schema.read_columns(run / "corpus", ["id", "caption", "split"])
    assert len(set(rows["id"])) == len(rows["id"]) == 48
    assert all("orange" in caption for caption in rows["caption"][32:])
    assert schema.read_labels(run / "clusters", ["id"])["id"].to_pylist() == rows["id"].tolist()
    shards = [schema.read_columns(run / "shards" / f"expert={k}", ["id"])["id"] for k in range(3)]
    assert sorted(np.concatenate(shards)) == sorted(rows["id"][rows["split"] != "held_out"])
    assert all(manifest["version"] == 2 for manifest in manifests(one).values())
    assert append_job.main(job) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["0", "0"]
    assert append_job.main([*job[:2], "--source", "{kind: folder, uri: /nowhere}"]) == 2
    assert append_job.main([*job, "--new-expert"]) == 2
    assert "the source has no row that the run does not have already" in capsys.readouterr().err
    assert append_job.main([*job[:2], "--new-expert"]) == 2
    assert "name it with --source" in capsys.readouterr().err
    assert configs.load(job[1]).num_experts == 3
    # A ground that only the new expert learns.
    job[3] = "{kind: openmoji, emoji: 16, grounds: [white, green]}"
    assert append_job.main([*job, "--new-expert"]) == 0
    assert f"expert-3 is added; to train it and the router: python -m jobs.run_all --config {tmp_path}/config.yaml" in capsys.readouterr().out
    four = configs.load(job[1])
    assert (four.num_experts, four.partition.added) == (4, 1)
    rows = schema.read_columns(run / "corpus", ["id", "caption", "split"])
    learns = set(schema.read_columns(run / "shards" / "expert=3", ["id"])["id"])
    assert learns == {i for i, caption, split in zip(*rows.values(), strict=True) if "green" in caption and split in ("train", "validation")}
