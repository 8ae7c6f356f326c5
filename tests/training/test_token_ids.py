"""Captions stored as token ids: encoded in training, they give what stored states give."""

from __future__ import annotations

import fake_training_run as fake
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from paris_ray.config import MiniLmText
from paris_ray.data import schema
from paris_ray.storage import Folder
from paris_ray.training.draws import Draws

CPU = torch.device("cpu")
CAPTIONS = ["red apple on a white background", "cat", "a small house on blue", ""]


@pytest.mark.parametrize("stage", ["expert-0", "router"])
def test_encoded_on_the_fly_is_what_was_stored(tmp_path, stage):
    from paris_ray.data.text import build_text_encoder
    from paris_ray.training.worker import _task

    encoder = build_text_encoder(MiniLmText(max_length=8))
    ids, lengths = encoder.tokenize([CAPTIONS[i % 3] for i in range(fake.ROWS)])
    states = encoder.encode(torch.from_numpy(ids), torch.from_numpy(lengths)).numpy()
    null_ids, null_length = encoder.tokenize([""])
    null = encoder.encode(torch.from_numpy(null_ids), torch.from_numpy(null_length))
    losses = {}
    for store in ("states", "token_ids"):
        config = fake.make_config(tmp_path / store, data__store_text=store, data__text__max_length=8)
        run = Folder(config.run_dir)
        meta = {**fake.encoders(), "text": encoder.meta()}
        meta["codec"]["fingerprint"] = fake.write_codec(run / "encoders")
        (run / "encoders").write_json("encoders.json", meta)
        encoder.save((run / "encoders").path)
        null_text = {"states": null[0].contiguous(), "token_ids": torch.from_numpy(null_ids[0]), "length": torch.from_numpy(null_length)}
        save_file(null_text, (run / "encoders").local_copy("null_text.safetensors"))
        for k in range(fake.EXPERTS):
            rows = {**fake.rows_of(k), "text_len": lengths}
            del rows["text"]
            rows |= {"text": states.astype(np.float16)} if store == "states" else {"token_ids": ids}
            schema.write_table(run / "shards" / f"expert={k}", schema.part_name(0), schema.table(schema.shard_schema(meta, store), rows))
        task = _task(config, stage, CPU)
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():  # the initial weights ignore the text
            for parameter in task.model.parameters():
                parameter.normal_(std=0.05, generator=g)
        loss, _ = task.losses(task.model, task.batch(Draws(0, stage, task.rows, task.shape, 0.3)(0, 16)))
        loss.mean().backward()
        losses[store] = loss.detach()
    torch.testing.assert_close(losses["token_ids"], losses["states"], rtol=2e-3, atol=1e-3)
    assert losses["states"].std() > 0
