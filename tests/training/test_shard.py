from __future__ import annotations

import fake_training_run as fake
import numpy as np
import pytest
import torch

from paris_ray.config import ConfigError
from paris_ray.storage import Folder
from paris_ray.training.shard import read_rows


def test_order_is_by_id_whatever_the_files(tmp_path):
    rows = fake.rows_of(0)
    fake.write_shard(Folder(tmp_path / "one"), 0, rows)
    shuffled = np.random.default_rng(1).permutation(fake.ROWS)
    fake.write_shard(Folder(tmp_path / "three"), 0, {name: [column[i] for i in shuffled] if isinstance(column, list) else column[shuffled]
                                                       for name, column in rows.items()}, cuts=(3, 30))  # fmt: skip
    one, three = (read_rows(Folder(tmp_path / name), [0], "states") for name in ("one", "three"))
    for a, b in zip(one, three, strict=True):
        assert a.ids == b.ids == sorted(a.ids)
        assert torch.equal(a.latents, b.latents)
        assert torch.equal(a.text, b.text)
        assert torch.equal(a.text_len, b.text_len)


def test_rows_keep_their_columns_and_splits(tmp_path):
    for k in range(2):
        fake.write_shard(Folder(tmp_path), k, fake.rows_of(k))
    train, validation = read_rows(Folder(tmp_path), [0, 1], "states")
    assert (len(train), len(validation)) == (72, 8)
    assert train.latents.dtype == torch.float16
    source = fake.rows_of(1)
    for data in (train, validation):
        for i, name in enumerate(data.ids):
            assert data.labels[i] == int(name[0])
            if name.startswith("1-"):
                j = source["id"].index(name)
                assert np.array_equal(data.latents[i].numpy(), source["latent"][j])
                assert np.array_equal(data.text[i].numpy(), source["text"][j])
                assert data.text_len[i] == source["text_len"][j]


def test_no_training_rows(tmp_path):
    rows = fake.rows_of(0)
    fake.write_shard(Folder(tmp_path), 0, {**rows, "split": ["validation"] * fake.ROWS})
    with pytest.raises(ConfigError, match=r"experts \[0\] hold no row of the split 'train'"):
        read_rows(Folder(tmp_path), [0], "states")
