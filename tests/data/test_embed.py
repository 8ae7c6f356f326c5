"""The whole stage on a real local Ray."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from paris_ray import config as configs
from paris_ray import stages
from paris_ray.config import ConfigError
from paris_ray.data import embed as stage
from paris_ray.data import part, schema
from paris_ray.data.codec import load_codec
from paris_ray.data.embedding import build_embedder
from paris_ray.data.openmoji import ATTRIBUTION, OpenMoji
from paris_ray.data.phash import phash
from paris_ray.data.text import build_text_encoder, load_text_encoder
from paris_ray.manifest import StaleError
from paris_ray.storage import Folder

from .corpora import contents

pytestmark = pytest.mark.usefixtures("ray_local")


def run_config(run_dir, *sets):
    base = ("data.source.emoji=16", "data.rows_per_part=10", "data.encoder_batch=4", "data.max_encoders=2", "data.split.validation_rows=0.1")
    return configs.load("tiny", [f"run_dir={run_dir}", *base, *sets])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = tmp_path_factory.mktemp("embed") / "run"
    config = run_config(run)
    return config, run, stage.embed(config)


def test_counts_and_columns(made):
    config, run, manifest = made
    rows = schema.read_columns(Folder(run / "corpus"), schema.corpus_schema(json.loads((run / "encoders/encoders.json").read_text()), "states").names)
    assert len(rows["id"]) == len(set(rows["id"])) == 32
    assert [path.name for path in sorted((run / "corpus").glob("part-*"))] == [schema.part_name(i) for i in range(4)]
    counts = manifest["counts"]
    assert (counts["rows"], counts["rejected"], counts["reasons"]) == (32, 0, {})
    assert counts["splits"] == {split: int((rows["split"] == split).sum()) for split in schema.SPLITS}
    items = OpenMoji(config.data.source, 32).items()
    assert rows["source"].tolist() == [item.source for item in items]
    assert rows["caption"].tolist() == [item.caption for item in items]
    assert rows["latent"].shape == (32, 12, 8, 8)
    assert rows["embedding"].shape == (32, 1280)
    assert rows["text"].shape == (32, 16, 384)
    assert not rows["caption_cut"].any()
    assert stages.status(config, "embed").state == stages.status(config, "encoders").state == "valid"


def test_columns_against_the_encoders_called_directly(made):
    config, run, _ = made
    rows = schema.read_columns(Folder(run / "corpus"), ["caption", "latent", "embedding", "text", "text_len", "split"])
    source = OpenMoji(config.data.source, 32)
    pixels = np.stack([part.read_row(source, item, config.data, config.seed).pixels for item in source.items()])
    hashes = schema.read_columns(Folder(run / "corpus"), ["phash"])["phash"].view(np.uint64)
    assert hashes.tolist() == [phash(image) for image in pixels]
    text = build_text_encoder(config.data.text)
    ids, lengths = text.tokenize(rows["caption"].tolist())
    assert (rows["text_len"] == lengths).all()
    assert (rows["text"] == text.encode(torch.from_numpy(ids), torch.from_numpy(lengths)).numpy().astype(np.float16)).all()
    assert (rows["embedding"] == build_embedder(config.data.embedding)(pixels).astype(np.float16)).all()
    codec = load_codec(str(run / "encoders"), json.loads((run / "encoders/encoders.json").read_text())["codec"])
    assert (rows["latent"] == codec.encode(pixels).numpy().astype(np.float16)).all()
    train = rows["split"] == "train"
    error = ((codec.decode(torch.from_numpy(rows["latent"][train])) / 255.0 - pixels[train] / 255.0) ** 2).mean()
    assert -10 * np.log10(error) > 18
    # The codec has seen the training split and nothing else.
    patches = pixels[train].reshape(-1, 8, 4, 8, 4, 3).swapaxes(2, 3).reshape(-1, 48) / 255
    np.testing.assert_allclose(load_file(run / "encoders/codec/codec.safetensors")["mean"], patches.mean(0), atol=1e-6)


def test_what_the_run_carries(made):
    _, run, _ = made
    meta = json.loads((run / "encoders/encoders.json").read_text())
    assert meta["attribution"] == ATTRIBUTION
    assert meta["codec"]["latent_size"] == 8
    text = load_text_encoder(str(run / "encoders"), meta["text"])
    ids, lengths = text.tokenize([""])
    null = load_file(run / "encoders/null_text.safetensors")
    assert (null["token_ids"] == ids[0]).all()
    assert (null["length"] == lengths).all()
    assert (null["states"] == text.encode(torch.from_numpy(ids), torch.from_numpy(lengths))[0].numpy()).all()
    event = json.loads((run / "events/embed.json").read_text())
    assert (event["state"], event["done"], event["total"], event["unit"]) == ("done", 32, 32, "rows")


def test_done_is_skipped_and_a_lost_part_is_made_again_the_same(made, tmp_path, monkeypatch):
    _, run, manifest = made
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    before = contents(copy / "corpus")
    monkeypatch.setattr(stage, "encode", lambda *a: pytest.fail("encoded again"))
    assert stage.embed(run_config(copy))["fingerprint"] == manifest["fingerprint"]
    monkeypatch.undo()
    # As after a crash: no manifest, one part missing, another upload unfinished.
    (copy / "corpus/_manifest.json").unlink()
    (copy / "corpus" / schema.part_name(2)).unlink()
    (copy / f"corpus/.tmp-0-{schema.part_name(2)}").write_bytes(b"half")
    stamps = {path.name: path.stat().st_mtime_ns for path in (copy / "corpus").glob("part-*")}
    again = stage.embed(run_config(copy))
    assert again["fingerprint"] == manifest["fingerprint"]
    assert contents(copy / "corpus") == before
    assert {name: (copy / "corpus" / name).stat().st_mtime_ns for name in stamps} == stamps  # the others were not touched


def test_other_inputs_are_refused(made):
    _, run, _ = made
    with pytest.raises(StaleError, match=r"channels: 12 → 8"):
        stage.embed(run_config(run, "data.codec.channels=8"))
    # Where and on how much it runs is no input.
    assert stages.status(run_config(run, "data.max_encoders=7"), "embed").state == "valid"


def test_neither_parts_nor_actors_nor_batches_change_a_row(made, tmp_path):
    _, run, _ = made
    stage.embed(run_config(tmp_path / "run", "data.rows_per_part=32", "data.encoder_batch=64", "data.max_encoders=1"))
    names = ["id", "latent", "embedding", "text", "split"]
    one, other = schema.read_columns(Folder(run / "corpus"), names), schema.read_columns(Folder(tmp_path / "run/corpus"), names)
    assert all((one[name] == other[name]).all() for name in names)


def test_a_worker_s_user_error_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="could not be fetched") as caught:
        stage.embed(run_config(tmp_path / "run", "data.text.kind=clip", "data.text.source=nobody/nothing"))
    assert "Traceback" not in str(caught.value)
