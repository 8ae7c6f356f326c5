"""What a comparison judged by FID asks for, and what its reference is."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from planted import config

from paris_ray.config import ConfigError
from paris_ray.evaluation import compare_config, compare_work
from paris_ray.evaluation.arrays import load
from paris_ray.evaluation.compare_captions import Caption
from paris_ray.evaluation.compare_tables import way_header
from paris_ray.manifest import MANIFEST
from paris_ray.storage import Folder


class Judge:
    fingerprint = "j"

    def __call__(self, pictures):
        return np.asarray(pictures)


def test_fid_is_named_after_how_many_pictures_it_is_of():
    header = way_header(SimpleNamespace(fid=True, independent=True, compare=compare_config.load("compare_paper")))
    assert {"FID-10K", "KID-10K"} <= {*header}


def test_guidance_is_not_chosen_by_the_fid_of_too_few_pictures():
    with pytest.raises(ConfigError, match="validation_captions is 2048, by whose FID guidance is chosen; more than 2048 pictures"):
        compare_config.load("compare_paper", ["validation_captions=2048"])
    assert compare_config.load("compare_paper", ["validation_captions=2049"])


def test_the_reference_has_no_more_originals_than_fid_is_published_of(tmp_path, monkeypatch):
    mine = config(tmp_path, "held_out_captions=0")
    source = Folder(compare_work.partition_folder(mine, "experts").uri)
    (source / "corpus").write_json(MANIFEST, {"fingerprint": "x", "counts": {}, "files": []})
    (source / "encoders").write_json("encoders.json", {"codec": {}, "embedding": {"fingerprint": "e"}})
    rows = [Caption(str(i), "a fox", 0) for i in range(7)]
    monkeypatch.setattr(compare_work, "REFERENCE", 5)
    monkeypatch.setattr(compare_work, "choose", lambda compare, run, part, count: rows[:count])
    monkeypatch.setattr(compare_work, "read_latents", lambda folder, ids: np.array([[float(one)] for one in ids], np.float32))
    monkeypatch.setattr("paris_ray.data.codec.load_codec", lambda *_: SimpleNamespace(decode=lambda latents: latents))
    monkeypatch.setattr(compare_work, "judge", lambda compare: Judge())
    monkeypatch.setattr(compare_work, "_scorer", lambda base: None)
    compare_work.draw_reference(mine)
    assert load(Folder(mine.folder) / "reference", "validation").tolist() == [[0], [1], [2], [3], [4]]
