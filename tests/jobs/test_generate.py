"""A prompts file to pictures: the engine's bytes, provenance, resuming, and what is wrong said before anything is drawn."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from jobs import generate as job
from paris_ray.config import PatchPcaCodec as PatchPcaConfig
from paris_ray.data.codec import PatchPcaCodec, PatchSums
from paris_ray.inference import batch, prompt_file
from paris_ray.inference.engine import Engine, ImageRequest, generate
from paris_ray.inference.prompt_file import PromptFileError, read_prompts
from paris_ray.inference.save import save_model
from paris_ray.inference.weights import load_model, read_facts

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
import released


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("release") / "paris"
    released.write_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa red fox\n\n  Zwei Sterne: „hell“  \r\n狐狸\n", encoding="utf-8")
    return path


@pytest.fixture
def run(checkpoint, tmp_path):
    def run(prompts, *more, out="out"):
        return job.main(["--model", str(checkpoint), "--prompts", str(prompts), "--out", str(tmp_path / out), "--steps", "2", *more])

    return run


def pictures(folder):
    return {path.name: path for path in sorted(folder.glob("*.png")) if not path.name.startswith("contact-sheet")}


def lines(folder):
    return [json.loads(line) for line in (folder / "routing.jsonl").read_text().splitlines()]


def test_pictures_are_the_engines_with_provenance(run, prompts, model, tmp_path, capsys):
    assert run(prompts, "--n", "2", "--seed", "7", "--routing", "full", "--guidance", "3", "--negative-prompt", "blur") == 0
    said = lines(tmp_path / "out")
    assert [(one["line"], one["index"]) for one in said] == [(1, 0), (1, 1), (3, 0), (3, 1), (4, 0), (4, 1)]
    assert [one["prompt"] for one in said[::2]] == ["a red fox", "Zwei Sterne: „hell“", "狐狸"]
    assert set(pictures(tmp_path / "out")) == {one["file"] for one in said}
    for one in said:
        request = ImageRequest(one["prompt"], "blur", 7, one["index"], 2, 3.0, "full", "euler")
        (expected,) = generate(model, [request])
        with Image.open(tmp_path / "out" / one["file"]) as image:
            assert np.array_equal(np.asarray(image), expected.image)
            parameters, routing = image.info["parameters"], json.loads(image.info["routing"])
        assert parameters.startswith(
            f"{one['prompt']}\nNegative prompt: blur\nSteps: 2, Sampler: euler, CFG scale: 3, Seed: 7, Index: {one['index']}"
        )
        assert routing["steps"] == one["weights"]
        np.testing.assert_allclose([s["weights"] for s in one["weights"]], [s["weights"] for s in expected.routing], atol=1e-5)
        assert (one["seed"], one["steps"], one["routing"], one["degraded"]) == (7, 2, "full", [])
    assert said[0]["file"].startswith("a-red-fox-7-0-")
    with Image.open(tmp_path / "out" / "contact-sheet-000.png") as sheet:
        assert sheet.width == 2 * 200  # a row a prompt: 16 pixels twelve times, and a margin
        pixel = np.asarray(Image.open(tmp_path / "out" / said[3]["file"]))[5, 9]
        assert tuple(sheet.getpixel((200 + 4 + 9 * 12 + 6, 200 + 14 + 4 + 5 * 12 + 6))) == tuple(pixel)
    output = capsys.readouterr()
    assert "6 pictures drawn, 0 kept, 0 failed" in output.out
    assert "generate: 6 / 6 pictures" in output.err


def test_the_same_command_again_draws_only_what_is_missing(run, prompts, tmp_path, capsys):
    assert run(prompts) == 0
    before = {name: path.read_bytes() for name, path in pictures(tmp_path / "out").items()}
    stamp = {name: path.stat().st_mtime_ns for name, path in pictures(tmp_path / "out").items()}
    first, second, _ = before
    (tmp_path / "out" / first).unlink()
    (tmp_path / "out" / second).write_bytes(before[second][:-100])  # a picture cut off
    capsys.readouterr()
    assert run(prompts) == 0
    assert "2 pictures drawn, 1 kept" in capsys.readouterr().out
    assert {name: path.read_bytes() for name, path in pictures(tmp_path / "out").items()} == before
    assert sum(path.stat().st_mtime_ns == stamp[name] for name, path in pictures(tmp_path / "out").items()) == 1
    # A line more, in front, moves nothing; another setting is another picture.
    prompts.write_text("new\n" + prompts.read_text().lstrip("\ufeff"))
    assert run(prompts) == 0
    assert "1 pictures drawn, 3 kept" in capsys.readouterr().out
    for change in (("--guidance", "2"), ("--seed", "1"), ("--precision", "int8")):
        assert run(prompts, *change) == 0
        assert "4 pictures drawn, 0 kept" in capsys.readouterr().out
    assert len(lines(tmp_path / "out")) == 4  # of the last command


def test_another_model_is_another_picture(run, prompts, checkpoint, model, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "other")
    file = tmp_path / "other" / "expert_1" / released.EXPERT_FILE
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    other = batch.identity(read_facts(tmp_path / "other"), "fp32")
    assert other != batch.identity(model, "fp32") == batch.identity(read_facts(checkpoint), "fp32") != batch.identity(model, "int8")


def test_json_lines_say_more(run, tmp_path, model):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a fox", "n": 2, "seed": 3}, {"prompt": "a fox", "routing": "top-1", "guidance_scale": 1, "steps": 3, "solver": "heun"},
            {"prompt": "", "negative_prompt": "blur", "seed": None, "guidance_interval": [0.2, 0.8]}, {"prompt": "a fox", "seed": 3}]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    assert run(path, "--seed", "5") == 0
    said = lines(tmp_path / "out")
    assert [(one["seed"], one["index"], one["steps"], one["routing"]) for one in said] == [
        (3, 0, 2, "top-2"), (3, 1, 2, "top-2"), (5, 0, 3, "top-1"), (5, 0, 2, "top-2"), (3, 0, 2, "top-2"),
    ]  # fmt: skip
    with Image.open(tmp_path / "out" / said[3]["file"]) as image:
        assert "CFG interval: 0.2 to 0.8" in image.info["parameters"]
    assert said[0]["file"] == said[4]["file"]  # asked twice, drawn once
    assert len(pictures(tmp_path / "out")) == 4
    (expected,) = generate(model, [ImageRequest("a fox", seed=5, steps=3, guidance_scale=1.0, routing="top-1", solver="heun")])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / said[2]["file"])), expected.image)


def test_bad_lines_are_named_before_anything_is_drawn(run, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    bad = ['{"prompt": "good"}', '{"prompt": "a", "step": 3}', "not json", '["a"]', '{"seed": 1}', '{"prompt": "a", "steps": 0}',
           '{"prompt": "a", "routing": "top-9"}', '{"prompt": 5}', '{"prompt": "a", "n": 0}', '{"prompt": "a", "routing": "caption"}']  # fmt: skip
    path.write_bytes("\n".join(bad).encode() + b'\n{"prompt": "\xff"}\n')
    assert run(path) == 2
    message = capsys.readouterr().err
    for number, what in (
        (2, "'step' is not a field; did you mean 'steps'?"), (3, "not valid JSON"), (4, "is no object"), (5, "prompt is missing"),
        (6, "steps: 0 must be"), (7, "routing: 'top-9'"), (8, "prompt: 5 must be text"), (9, "n: 0 must be"), (10, "needs a router that reads text"),
        (11, "can't decode"),
    ):  # fmt: skip
        assert any(line.removeprefix("generate: ").startswith(f"{path}:{number}: ") and what in line for line in message.splitlines()), what
    assert f"{path}:1:" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--steps", "0"], "steps: 0"), (["--max-resident", "0"], "max_resident: 0"), (["--prompts", "nowhere.txt"], "nowhere.txt"),
     (["--model", "nowhere"], "holds no model"), (["--n", "0"], "n: 0"), (["--max-rows", "0"], "max_rows: 0"),
     (["--guidance-interval", "0.8,0.2"], "guidance_interval: (0.8, 0.2)"), (["--out", __file__], "test_generate.py is a file; name a folder"),
     (["--device", "cuda:1"], "device: 'cuda:1' names a GPU by its number, but Ray gives each actor one of its own; with --actors give cuda")],
)  # fmt: skip
def test_bad_arguments_are_one_message(run, prompts, capsys, tmp_path, arguments, message):
    """Here or with actors, and then before there are any."""
    for more in ([] if "--device" in arguments else [[]]) + [["--actors", "2"]]:
        assert run(prompts, *arguments, *more) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    ("device", "message"), [("cuda", "device: 'cuda' is not here: torch"), ("gpu", "device: 'gpu' is none that torch knows; give cpu")]
)
def test_a_device_that_is_not_here_is_named(run, prompts, capsys, device, message):
    assert run(prompts, "--device", device) == 2
    assert message in capsys.readouterr().err


def test_an_interval_is_two_times(run, prompts, capsys):
    for text in ("0.2", "0.2,b", "0.2,0.3,0.4"):
        with pytest.raises(SystemExit):
            run(prompts, "--guidance-interval", text)
        assert f"{text!r} must be two times, LOW,HIGH" in capsys.readouterr().err


def test_guidance_in_an_interval(run, prompts, model, tmp_path):
    assert run(prompts, "--steps", "4", "--guidance-interval", "0.2,0.8") == 0
    said = lines(tmp_path / "out")[0]
    assert said["guidance_interval"] == [0.2, 0.8]
    (expected,) = generate(model, [ImageRequest("a red fox", steps=4, guidance_interval=(0.2, 0.8))])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / said["file"])), expected.image)
    (without,) = generate(model, [ImageRequest("a red fox", steps=4)])
    assert not np.array_equal(without.image, expected.image)


def test_max_rows_reaches_the_engine(run, prompts, monkeypatch, tmp_path):
    active = []
    tick = Engine.tick
    monkeypatch.setattr(Engine, "tick", lambda self, *a: (tick(self, *a), active.append(self.metrics["active"]))[0])
    assert run(prompts, "--n", "3", "--max-rows", "2") == 0
    assert max(active) == 2
    assert len(pictures(tmp_path / "out")) == 9


def test_the_help_names_every_field_of_a_line():
    fields = {f.name for f in dataclasses.fields(ImageRequest)} - {"index", "client"}
    assert fields == {name for name in fields if name in job.__doc__} == set(prompt_file.FIELDS)


def test_a_picture_is_decoded_once(run, prompts, monkeypatch):
    decoded = []
    end = PngImageFile.load_end
    monkeypatch.setattr(PngImageFile, "load_end", lambda self: decoded.append(1) or end(self))
    assert run(prompts) == 0
    assert len(decoded) == 3
    assert run(prompts) == 0  # all kept
    assert len(decoded) == 6


def test_a_flipped_bit_in_a_kept_picture_is_noticed(run, prompts, tmp_path, capsys):
    assert run(prompts) == 0
    path = next(iter(pictures(tmp_path / "out").values()))
    whole = path.read_bytes()
    for place in (whole.index(b"IDAT") + 6, whole.index(b'"steps"') + 30):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert run(prompts) == 0
        assert "1 pictures drawn, 2 kept" in capsys.readouterr().out
        assert path.read_bytes() == whole


def test_an_expert_without_files_is_missing(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "expert_1")
    assert [expert.state for expert in job._card(read_facts(tmp_path / "part")).experts] == ["ready", "missing", "ready"]


def test_facts_are_those_of_the_loaded_model(checkpoint, model, tmp_path):
    save_model(model, tmp_path / "ours")
    for path in (checkpoint, tmp_path / "ours"):
        facts, whole = read_facts(path), load_model(path)
        for name in ("num_experts", "image_size", "latent_shape", "objectives", "defaults", "router_reads_text", "present"):
            assert getattr(facts, name) == getattr(whole, name), name
        assert facts.info["text"]["width"] == whole.text_encoder.width
        assert facts.image_size == facts.latent_shape[1] * whole.codec.downsampling


def test_an_empty_file_and_one_that_asks_for_too_much(model, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_file, "MAX_PICTURES", 5)
    path = tmp_path / "prompts.txt"
    path.write_text("\n \n")
    with pytest.raises(PromptFileError, match="no prompt in it"):
        read_prompts(str(path), model, ImageRequest(""))
    path.write_text("a\nb\n")
    with pytest.raises(PromptFileError, match=r":2: more than 5 pictures"):
        read_prompts(str(path), model, ImageRequest(""), 3)


def test_a_picture_that_fails_does_not_stop_the_others(run, prompts, tmp_path, capsys, monkeypatch):
    draw = batch.Artist.draw

    def broken(self, requests):
        for number, result in draw(self, requests):
            yield number, ArithmeticError("not finite") if number == 1 else result

    monkeypatch.setattr(batch.Artist, "draw", broken)
    assert run(prompts) == 1
    output = capsys.readouterr()
    assert "2 pictures drawn, 0 kept, 1 failed" in output.out
    assert "zwei-sterne-hell-0-0-" in output.err
    assert "ArithmeticError: not finite" in output.err
    assert len(lines(tmp_path / "out")) == 2
    monkeypatch.undo()
    assert run(prompts) == 0
    assert "1 pictures drawn, 2 kept" in capsys.readouterr().out


def test_a_batch_larger_than_the_queue_comes_out_in_full(checkpoint, model):
    artist = batch.Artist(str(checkpoint), max_rows=2)
    requests = [ImageRequest("a fox", seed=3, index=i, steps=1 + i % 3) for i in range(11)]
    drawn = dict(artist.draw(requests))
    expected = generate(model, requests)
    assert [drawn[i].image.tobytes() for i in range(11)] == [result.image.tobytes() for result in expected]


@pytest.fixture(scope="module")
def light(model, tmp_path_factory):
    """The same experts with a codec that no process has to import diffusers for."""
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    sums = PatchSums.zero(2)
    sums.add(images, 2)
    codec = PatchPcaCodec.fit(PatchPcaConfig(downsampling=2, channels=4), sums)
    path = tmp_path_factory.mktemp("light") / "model"
    save_model(dataclasses.replace(model, codec=codec, info={**model.info, "codec": codec.meta()}), path)
    return path


@pytest.mark.usefixtures("ray_local")
def test_actors_give_the_same_bytes(run, prompts, tmp_path, light, monkeypatch):
    assert run(prompts, "--n", "2", "--model", str(light)) == 0
    # This process needs nothing of the model's weights.
    monkeypatch.setattr(batch, "load_model", lambda *a: pytest.fail("loaded a model"))
    assert run(prompts, "--n", "2", "--model", str(light), "--actors", "2", out="spread") == 0
    one, two = (
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((tmp_path / name).glob("*.*"))} for name in ("out", "spread")
    )
    assert one == two
    assert len(one) == 6 + 2
