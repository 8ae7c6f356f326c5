"""The stage over every kind of source, in this process."""

import hashlib
import json
import shutil
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
from PIL import Image

from paris_ray import config as configs
from paris_ray import stages
from paris_ray.config import ConfigError
from paris_ray.data import embed as stage
from paris_ray.data import part, partition, schema
from paris_ray.data.codec import PatchSums
from paris_ray.data.images import PIXEL_BYTES
from paris_ray.data.sources import files
from paris_ray.manifest import StaleError, published
from paris_ray.storage import Folder

from . import in_process as in_process_ray
from . import light
from .corpora import WRITERS, contents
from .fabricated_corpus import shard_bytes, without_pictures
from .in_process import in_process  # noqa: F401
from .test_parquet import png

pytestmark = pytest.mark.usefixtures("in_process")


def run_config(run, kind, uri, *sets):
    light = ("data.codec.channels=4", "data.image_size=16", "data.encoder_batch=7", "data.embedding.image_size=32", "data.store_text=token_ids")
    shares = ("data.split.held_out_rows=0.2", "data.split.validation_rows=0.2")
    source = f"data.source={{kind: {kind}, uri: {uri}}}"
    return configs.load("tiny", [f"run_dir={run}", source, "data.rows_per_part=8", *light, *shares, *sets])


def rows(n, seed=0):
    """Pictures of many sizes in three formats, with captions short and too long."""
    g = np.random.default_rng(seed)
    found = []
    for i in range(n):
        size = tuple(int(x) for x in g.integers(18, 60, 2))
        found.append((f"{i:03d}.png", png(seed * 1000 + i, size), f"picture {i} " + "and so on " * int(g.integers(0, 9))))
    return found


def test_the_same_rows_from_every_kind_of_source_are_the_same_corpus_and_shards(tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    same, corpora, fitted, counts, shards = rows(24), {}, {}, {}, {}
    same += [("dup.png", *same[3][1:]), ("other.png", same[4][1], "another caption")]
    for kind, write in WRITERS.items():
        config = run_config(tmp_path / f"run-{kind}", kind, write(tmp_path / kind, same), "partition.fine=6", "partition.max_share=null")
        manifest = stage.embed(config)
        partition.partition(config)
        run = Folder(config.run_dir)
        shards[kind] = shard_bytes(tmp_path / f"run-{kind}")
        names = ["id", "caption", "token_ids", "text_len", "caption_cut", "latent", "embedding", "split", "group", "phash", "width", "height"]
        columns = schema.read_columns(run / "corpus", names)
        order = np.argsort(columns["id"].astype(str))
        corpora[kind] = {name: values[order] for name, values in columns.items()}
        fitted[kind] = (run / "encoders").read_bytes("codec/codec.safetensors")
        counts[kind] = dict(manifest["counts"])
        (named,) = counts[kind].pop("examples")["duplicate"]  # by what the source calls a row
        assert named
    first = corpora["folder"]
    assert len(set(first["id"])) == 25
    assert set(first["split"]) == set(schema.SPLITS[:3])
    assert len(shards["folder"]) == 3
    for kind in WRITERS:
        assert shards[kind] == shards["folder"], kind
        assert counts[kind] == counts["folder"]
        assert fitted[kind] == fitted["folder"]
        for name, values in corpora[kind].items():
            assert values.dtype == first[name].dtype
            assert (values == first[name]).all(), (kind, name)
    assert counts["folder"]["listed"] == 26
    assert counts["folder"]["reasons"] == {"duplicate": 1}


def test_captions_that_are_cut_are_counted(tmp_path):
    same = rows(20)
    config = run_config(tmp_path / "run", "parquet", WRITERS["parquet"](tmp_path / "p", same))
    counts = stage.embed(config)["counts"]
    longer = [len(caption.split()) + 2 > 16 for _, _, caption in same]  # each word is one token, and [CLS] and [SEP]
    assert 0 < counts["captions_cut"] == sum(longer) < 20
    found = schema.read_columns(Folder(config.run_dir) / "corpus", ["caption", "caption_cut", "text_len"])
    by_caption = {" ".join(row[2].split()): cut for row, cut in zip(same, longer, strict=True)}
    assert dict(zip(found["caption"], found["caption_cut"], strict=True)) == by_caption
    assert (found["text_len"][found["caption_cut"]] == 16).all()


def test_progress_of_a_source_that_does_not_say_how_many_rows_it_has(tmp_path):
    config = run_config(tmp_path / "run", "webdataset", WRITERS["webdataset"](tmp_path / "w", rows(12), files=3))
    assert stage.embed(config)["counts"]["rows"] == 12
    event = Folder(config.run_dir).read_json("events/embed.json")
    assert (event["done"], event["total"]) == (12, 12)


def test_duplicates_of_a_folder_that_grows(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a", "zz"):
        (images / f"{name}.png").write_bytes(b"no picture")
        (images / f"{name}.txt").write_text(name)
    for n in range(24):
        noise = np.random.default_rng(n).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(images / f"n{n:02d}.png")
        (images / f"n{n:02d}.txt").write_text(f"noise {n}")
    for name, of, caption in (("z1", "n03", "noise 3"), ("z2", "n03", "noise 3"), ("z3", "n03", "another caption")):
        shutil.copy(images / f"{of}.png", images / f"{name}.png")
        (images / f"{name}.txt").write_text(caption)
    config = run_config(tmp_path / "run", "folder", images)
    counts = stage.embed(config)["counts"]
    assert (counts["rows"], counts["rejected"], counts["reasons"]) == (24 + 1, 4, {"not an image": 2, "duplicate": 2})
    rejected = {row["source"]: row["reason"] for path in (tmp_path / "run/rejected").glob("part-*") for row in pq.read_table(path).to_pylist()}
    made = schema.read_columns(Folder(tmp_path / "run/corpus"), ["id", "source", "group", "token_ids", "split"])
    by_source = dict(zip(made["source"], made["id"], strict=True))
    assert rejected["z1.png"] == rejected["z2.png"] == f"duplicate: of {by_source['n03.png']}"
    groups = dict(zip(made["source"], made["group"], strict=True))
    assert groups["z3.png"] == groups["n03.png"]
    assert counts["listed"] == counts["rows"] + counts["rejected"]
    assert made["token_ids"].dtype == np.int32
    # The same after a crash that lost the parts with the duplicates and the rejects of another.
    before = contents(tmp_path / "run/corpus"), contents(tmp_path / "run/rejected")
    lost = [f"corpus/{schema.part_name(3)}", f"corpus/{schema.part_name(0)}", f"rejected/{schema.part_name(0)}"]
    for name in ("corpus/_manifest.json", *lost):
        (tmp_path / "run" / name).unlink()
    for folder in ("corpus", "rejected"):
        (tmp_path / "run" / folder / f".tmp-0-{schema.part_name(0)}").write_bytes(b"half")
    assert stage.embed(config)["counts"] == counts
    assert (contents(tmp_path / "run/corpus"), contents(tmp_path / "run/rejected")) == before
    listed = {file["name"]: file["sha256"] for file in published(Folder(tmp_path / "run/rejected"))["files"]}
    assert listed == {name: hashlib.sha256(content).hexdigest() for name, content in before[1].items()}
    # A folder that has grown under a run that is not done is not mixed into it.
    (tmp_path / "run/corpus/_manifest.json").unlink()
    shutil.copy(images / "n04.png", images / "new.png")
    with pytest.raises(StaleError, match=r"the source has changed.*--rebuild embed"):
        stage.embed(config)


def test_what_a_worker_takes_is_asked_for(tmp_path, monkeypatch):
    """At least its files, its largest picture and its weights, and no more than the largest node has, where it would wait for ever."""
    config = run_config(tmp_path / "run", "parquet", WRITERS["parquet"](tmp_path / "p", rows(20)), "data.encoder_cpus=2", "data.max_pixels=1000000")
    in_process_ray.ASKED.clear()
    stage.embed(config)
    summing, encoding = (one["memory"] for one in in_process_ray.ASKED)
    assert summing >= part.AHEAD_BYTES + files.MAX_FILE_BYTES + PIXEL_BYTES * 10**6
    backbone = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    weights = sum(value.nbytes for value in backbone.state_dict().values())
    weights += sum(path.stat().st_size for path in (tmp_path / "run/encoders").rglob("*.safetensors"))
    assert 0 < encoding - summing - weights - PIXEL_BYTES * 10**6 < 8 << 20  # another thread's picture; small rows
    nodes = [{"Alive": True, "Resources": {"memory": 2.0**20}}, {"Alive": True, "Resources": {}}, {"Alive": False, "Resources": {"memory": 2.0**40}}]
    monkeypatch.setattr(sys.modules["ray"], "nodes", lambda: nodes)
    (tmp_path / "run/corpus/_manifest.json").unlink()
    next((tmp_path / "run/corpus").glob("part-*")).unlink()
    stage.embed(config)
    assert in_process_ray.ASKED[-1]["memory"] == 2**20


def test_small_pictures_and_refused_ones_are_counted_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "EncodePart", light.LightEncode)
    monkeypatch.setattr(stage, "_save_frozen", light.save_frozen)
    made = [(f"{i:02d}.png", png(i, (24, 20)), f"picture {i}") for i in range(20)]
    made += [("dot.png", png(30, (1, 1)), "a dot"), ("low.png", png(31, (40, 15)), "low"), ("enough.png", png(32, (16, 16)), "enough")]
    made += [(f"broken{i}.png", b"no picture", "broken") for i in range(5)]
    config = light.light_config(tmp_path / "run", f"{{kind: folder, uri: {WRITERS['folder'](tmp_path / 'images', made)}}}")
    counts = stage.embed(config)["counts"]
    assert (counts["rows"], counts["rejected"], counts["enlarged"]) == (23, 5, 2)
    assert counts["examples"] == {"not an image": ["broken0.png", "broken1.png", "broken2.png"]}


def test_nothing_usable_is_an_error_that_says_why(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(b"")
    (images / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match="training split has no picture"):
        stage.embed(run_config(tmp_path / "run", "folder", images))
    assert json.loads((tmp_path / "run/events/embed.json").read_text())["state"] == "failed"
    # It leaves no mark: another source is not refused.
    (images / "a.png").unlink()
    with pytest.raises(ConfigError, match="no image"):
        stage.embed(run_config(tmp_path / "run", "folder", images))
    assert stages.status(run_config(tmp_path / "run", "folder", "/elsewhere"), "encoders").state == "absent"


def test_sums_for_the_codec_are_whole_numbers_in_any_order():
    images = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    patches = images.reshape(30, 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(-1, 48).astype(np.int64)
    for seed in range(3):
        total = PatchSums.zero(4)
        for piece in np.array_split(np.random.default_rng(seed).permutation(30), 1 + 4 * seed):
            sums = PatchSums.zero(4)
            sums.add(images[piece], 4)
            total.merge(sums)
        assert (total.outer == patches.T @ patches).all()
        assert (total.total == patches.sum(0)).all()
    # Eleven million pictures of 256 pixels: float64 still holds every whole number.
    assert 11_000_000 * (256 // 4) ** 2 * 255**2 < 2**53
