"""The diffusers pipeline gives the engine's pictures, in diffusers' words."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import released
import torch

from paris_ray.inference import pipeline, weights
from paris_ray.inference.engine import ImageRequest, ImageResult, generate
from paris_ray.inference.pipeline import ParisPipeline
from paris_ray.inference.weights import load_model
from paris_ray.models import Router


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("released") / "model"
    released.write_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def pipe(checkpoint):
    return fresh(checkpoint)


def fresh(checkpoint, **more):
    pipe = ParisPipeline.from_pretrained(checkpoint, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def engine(checkpoint, **fields):
    return generate(load_model(checkpoint), [ImageRequest(**fields)])[0]


def test_it_is_a_diffusion_pipeline_with_the_engines_bytes(pipe, checkpoint):
    from diffusers import DiffusionPipeline

    assert isinstance(pipe, DiffusionPipeline)
    output = pipe(["a red fox", "two stars"], num_inference_steps=3, guidance_scale=4.0, negative_prompt="blur", num_images_per_prompt=2, seed=11,
                  routing="full", solver="heun")  # fmt: skip
    assert output.seeds == [11] * 4
    assert output.degraded == []
    for i, prompt in enumerate(["a red fox", "a red fox", "two stars", "two stars"]):
        expected = engine(checkpoint, prompt=prompt, negative_prompt="blur", seed=11, index=i, steps=3, guidance_scale=4.0, routing="full",
                          solver="heun")  # fmt: skip
        assert np.asarray(output.images[i]).tobytes() == expected.image.tobytes()
        assert output.routing[i] == expected.routing
    assert len(output.routing[0]) == 5
    assert len(output.routing[0][0]["weights"]) == 3


def test_defaults_are_the_models(pipe, checkpoint):
    output = pipe("a fox", seed=1, num_inference_steps=2)
    expected = engine(checkpoint, prompt="a fox", seed=1, steps=2, guidance_scale=7.5, routing="top-2", solver="euler")
    assert np.asarray(output.images[0]).tobytes() == expected.image.tobytes()
    assert output.images[0].size == (16, 16)
    assert all(sum(w > 0 for w in step["weights"]) == 2 for step in output.routing[0])


def test_guidance_in_an_interval(pipe, checkpoint):
    output = pipe("a fox", seed=1, num_inference_steps=4, guidance_interval=(0.2, 0.8), output_type="latent")
    expected = engine(checkpoint, prompt="a fox", seed=1, steps=4, guidance_interval=(0.2, 0.8))
    assert output.images.numpy().tobytes() == expected.latent[None].tobytes()
    assert not torch.equal(output.images, pipe("a fox", seed=1, num_inference_steps=4, output_type="latent").images)


def test_output_types(pipe, checkpoint):
    expected = engine(checkpoint, prompt="a fox", seed=1, steps=2)
    ask = {"prompt": "a fox", "seed": 1, "num_inference_steps": 2}
    assert np.array_equal(pipe(**ask, output_type="np").images[0], expected.image.astype(np.float32) / 255)
    tensor = pipe(**ask, output_type="pt").images
    assert tensor.shape == (1, 3, 16, 16)
    assert np.allclose(tensor[0].permute(1, 2, 0).numpy() * 255, expected.image)
    images, routing, seeds, degraded = pipe(**ask, output_type="latent", return_dict=False)
    assert images.numpy().tobytes() == expected.latent[None].tobytes()
    assert (len(routing), seeds, degraded) == (1, [1], [])


def test_generators_move_on_and_repeat(pipe):
    def draw(generator, **more):
        return pipe("a fox", num_inference_steps=1, output_type="latent", generator=generator, **more)

    g = torch.Generator().manual_seed(5)
    first, second = draw(g), draw(g)
    assert not torch.equal(first.images, second.images)
    assert torch.equal(draw(torch.Generator().manual_seed(5)).images, first.images)
    each = [torch.Generator().manual_seed(s) for s in (5, 6)]
    both = draw(each, num_images_per_prompt=2)
    assert torch.equal(both.images[:1], first.images)
    assert both.seeds[0] == first.seeds[0] != both.seeds[1]
    drawn = {draw(None).seeds[0] for _ in range(3)}
    assert len(drawn) == 3  # no constant default seed
    assert draw(None, seed=0).seeds == [0]


def test_save_and_load(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "copy")
    again = ParisPipeline.from_pretrained(tmp_path / "copy")
    again.set_progress_bar_config(disable=True)
    ask = {"prompt": "a fox", "seed": 1, "num_inference_steps": 2, "output_type": "latent"}
    assert torch.equal(again(**ask).images, pipe(**ask).images)
    with pytest.raises(FileExistsError):
        pipe.save_pretrained(tmp_path / "copy")
    with pytest.raises(ValueError, match="safe_serialization"):
        pipe.save_pretrained(tmp_path / "b", safe_serialization=False)


def test_offload_and_precision(checkpoint, pipe):
    ask = {"prompt": "a fox", "seed": 1, "num_inference_steps": 2, "routing": "full", "output_type": "latent"}
    other = fresh(checkpoint, max_resident=2)
    other.enable_model_cpu_offload(device="cpu")
    assert torch.equal(other(**ask).images, pipe(**ask).images)
    assert sum(other.engine.experts.resident) == 1
    assert other.to("cpu") is other
    other.to(torch.bfloat16)
    assert other.dtype == torch.bfloat16
    near = other(**ask).images
    assert not torch.equal(near, pipe(**ask).images)
    assert (near - pipe(**ask).images).norm() / near.norm() < 0.1
    assert ParisPipeline.from_pretrained(checkpoint, torch.bfloat16).model.precision == "bf16"
    for ask_for in (lambda: other.to(torch.float16), lambda: ParisPipeline.from_pretrained("nowhere", torch_dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"dtype: torch.float16 ends at 65504.* use torch.bfloat16"):
            ask_for()
    assert torch.finfo(torch.float16).max == 65504
    with pytest.raises(ValueError, match=r"torch.float64 is not one of"):
        other.to(torch.float64)


# -- where it computes ----------------------------------------------------------------------------------------------------


def devices(model):
    parts = (model.router, model.codec.model, model.text_encoder.model)
    return {p.device.type for part in parts for p in part.parameters()} | {model.null_text.device.type}


def test_a_move_takes_what_is_in_memory_along_and_reads_nothing(checkpoint, monkeypatch):
    """There is no GPU here: ``meta``, a device without values, stands for one."""
    read = []
    load = weights.load_expert
    monkeypatch.setattr(weights, "load_expert", lambda *a, **k: read.append(a[0].uri[-1]) or load(*a, **k))
    monkeypatch.setattr(pipeline, "load_model", lambda *a: pytest.fail("read the model again"))
    pipe = ParisPipeline(load_model(checkpoint), max_rows=3)
    pipe.set_progress_bar_config(disable=True)
    ask = {"prompt": "a fox", "seed": 1, "num_inference_steps": 2, "routing": "full", "output_type": "latent"}
    before = pipe(**ask).images
    router = pipe.model.router = Router(3, 8, 2, 4, 24, 1, 3).eval()
    torch.nn.init.normal_(router.head[4].bias, std=3.0)
    replaced = pipe(**ask).images
    assert not torch.equal(replaced, before)
    assert sorted(read) == ["0", "1", "2"]
    # Type and device in two calls, and equal ones: nothing is read until a picture is asked for.
    pipe.to(torch.bfloat16).to("cpu").to(torch.float32).to("cpu", torch.float32).to(torch.bfloat16)
    pipe.to(dtype=torch.float32)
    assert len(read) == 3
    assert torch.equal(pipe(**ask).images, replaced)
    assert sorted(read) == ["0", "0", "1", "1", "2", "2"]
    loaded = pipe.engine.experts
    assert pipe.to("cpu").engine.experts is loaded

    assert devices(pipe.model) == {"cpu"}
    assert pipe.to("meta").device == torch.device("meta")
    assert pipe.model.router is router
    assert devices(pipe.model) == {"meta"}
    assert pipe.engine.max_rows == 3
    assert len(read) == 6


def test_equal_devices_are_the_same(monkeypatch):
    assert pipeline._normal(0) == pipeline._normal("cuda") == pipeline._normal(torch.device("cuda:0")) != pipeline._normal(1)
    assert pipeline._normal("cpu:0") == pipeline._normal("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert pipeline._normal("cuda") == pipeline._normal(2) != pipeline._normal("cuda:0")


@pytest.mark.parametrize(
    ("gpus", "arguments", "target"),
    [
        (True, {}, "cuda"),
        (True, {"gpu_id": 1}, "cuda:1"),
        (True, {"device": "cuda:1"}, "cuda:1"),
        (True, {"gpu_id": 1, "device": "cuda"}, "cuda:1"),
        (True, {"device": "cpu"}, "cpu"),
        (False, {"device": "meta"}, "meta"),
        (False, {}, None),
        (False, {"gpu_id": 1}, None),
    ],
)
def test_offload_computes_on_the_gpu(checkpoint, monkeypatch, gpus, arguments, target):
    """diffusers' users call it instead of ``.to("cuda")``."""
    pipe = fresh(checkpoint)
    moved = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(ParisPipeline, "to", lambda self, device: moved.append(str(device)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pipe.enable_model_cpu_offload(**arguments)
    assert moved == [target or "cpu"]
    assert ["no GPU here; sampling stays on the CPU" in str(w.message) for w in said] == ([] if target else [True])
    assert pipe.max_resident == 1
    with pytest.raises(ValueError, match="gpu_id: 1 beside device 'cuda:0'"):
        pipe.enable_model_cpu_offload(1, "cuda:0")


def test_a_second_gpu_stays_the_one(checkpoint, monkeypatch):
    pipe = fresh(checkpoint).to("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    pipe.enable_model_cpu_offload()
    assert pipe.device.type == "meta"


def test_tensors_are_answered_on_the_device(checkpoint):
    result = ImageResult(np.zeros((4, 4, 3), np.uint8), 0, 0, [], [], 0.0, np.zeros((4, 2, 2), np.float32))
    for kind in ("pt", "latent"):
        assert pipeline._as(kind, [result], torch.device("meta")).device.type == "meta"


def test_threads(checkpoint):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        fresh(checkpoint)
        assert torch.get_num_threads() == 2
        fresh(checkpoint, threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_parts_under_diffusers_names(pipe, checkpoint):
    from diffusers import AutoencoderKL

    assert isinstance(pipe.vae, AutoencoderKL)
    tokens = pipe.tokenizer.encode("a red fox")
    assert len(tokens) == 3
    assert pipe.text_encoder(torch.tensor([[49406, *tokens, *[49407] * 8]]))[1].shape == (1, 12, 32)
    with pytest.raises(AttributeError):
        pipe.vae = None
    assert ParisPipeline(**pipe.components).max_rows == 64


def test_the_hub_is_asked_with_the_options_given(checkpoint, monkeypatch):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options, name=name) or str(checkpoint))
    ParisPipeline.from_pretrained("some/paris", revision="v2", token="secret", cache_dir="/there", local_files_only=True)
    assert (asked["name"], asked["revision"], asked["token"], asked["cache_dir"], asked["local_files_only"]) == (
        "some/paris", "v2", "secret", "/there", True
    )  # fmt: skip
    with pytest.raises(ValueError, match="revision: 'v2' beside 'some/paris@v1'"):
        ParisPipeline.from_pretrained("some/paris@v1", revision="v2")


# -- the call, step by step -----------------------------------------------------------------------------------------------

ASK = {"prompt": ["a fox", "two stars"], "seed": 1, "guidance_scale": 3.0, "routing": "full", "output_type": "latent"}


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint", "dpmpp_2m"])
def test_the_callback_sees_every_step_and_its_latents_are_gone_on_from(pipe, solver):
    steps = 4
    ask = {**ASK, "solver": solver, "num_inference_steps": steps}
    plain = pipe(**ask).images
    seen = []

    def watch(it, step, t, kwargs):
        assert it is pipe
        seen.append((step, t, kwargs["latents"]))  # kept beyond the call, and returned as in diffusers' examples
        return kwargs

    assert torch.equal(pipe(**ask, callback_on_step_end=watch).images, plain)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    last = 0.25 if solver == "dpmpp_2m" else 0.001
    assert [t for _, t, _ in seen] == pytest.approx([1 - (1 - last) * i / 3 for i in range(steps)])
    assert all(latents.shape == (2, 4, 8, 8) and latents.device == pipe.device for _, _, latents in seen)
    assert torch.equal(seen[-1][2], plain)
    assert not seen[0][2].is_inference()

    # What a callback that returns nothing, or is given nothing, does is nothing.
    assert torch.equal(pipe(**ask, callback_on_step_end=lambda *a: None).images, plain)
    given = []
    pipe(**ask, callback_on_step_end=lambda *a: given.append(a[3]), callback_on_step_end_tensor_inputs=[])
    assert given == [{}] * steps

    # Put back to what they were after step 1, the pictures of other prompts become those of these.
    if solver != "dpmpp_2m":  # it remembers the step before

        def replace(it, step, t, kwargs):
            return {"latents": seen[1][2]} if step == 1 else {}

        once_more = pipe(**{**ask, "seed": 99}, callback_on_step_end=replace).images
        assert torch.equal(once_more, plain)
    # The last step's are the picture.
    zero = pipe(**ask, callback_on_step_end=lambda it, step, t, kwargs: {"latents": torch.zeros(2, 4, 8, 8)} if step == steps - 1 else {})
    assert not zero.images.any()


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_an_interrupt_ends_the_call_after_the_step(pipe, checkpoint, solver):
    kept = []

    def stop(it, step, t, kwargs):
        kept.append(kwargs["latents"].clone())
        if step == 1:
            it._interrupt = True

    output = pipe(**ASK, solver=solver, num_inference_steps=5, callback_on_step_end=stop)
    assert len(kept) == 2
    assert torch.equal(output.images, kept[1])
    assert [len(routing) for routing in output.routing] == [2 if solver == "euler" else 4] * 2
    assert pipe.interrupt
    # The next call is whole again, and has nothing of this one in it.
    assert len(pipe(**ASK, num_inference_steps=2).routing[0]) == 2
    assert not pipe.interrupt
    metrics = pipe.engine.metrics
    assert (metrics["active"], metrics["queued"]) == (0, 0)


def test_an_interrupt_from_elsewhere_waits_for_the_end_of_the_step(checkpoint, pipe, monkeypatch):
    """Heun's half-way state is no picture's."""
    tick = pipeline.Engine.tick

    def ticked(self, after):
        other.interrupt = True
        return tick(self, after)

    other = fresh(checkpoint)
    monkeypatch.setattr(pipeline.Engine, "tick", ticked)
    output = other(**ASK, solver="heun", num_inference_steps=5)
    assert [len(routing) for routing in output.routing] == [2, 2]


def test_more_pictures_than_rows_go_in_turns(checkpoint, pipe):
    small = fresh(checkpoint, max_rows=2)
    ask = {"prompt": "a fox", "num_images_per_prompt": 5, "seed": 1, "num_inference_steps": 2, "output_type": "latent"}
    seen = []
    images = small(**ask, callback_on_step_end=lambda it, step, t, kwargs: seen.append((step, len(kwargs["latents"])))).images
    assert seen == [(0, 2), (1, 2), (0, 2), (1, 2), (0, 1), (1, 1)]
    assert torch.equal(images, pipe(**ask).images)

    def stop(it, step, t, kwargs):
        it.interrupt = len(seen) == 8
        seen.append(step)

    # In the second turn: the first is whole, the last was not begun.
    output = small(**ask, callback_on_step_end=stop)
    assert torch.equal(output.images[:2], images[:2])
    assert [len(routing) for routing in output.routing] == [2, 2, 1, 1]


def test_a_callback_that_fails_ends_the_call(checkpoint, pipe):
    calls = []

    def fail(it, step, t, kwargs):
        calls.append(step)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fresh(checkpoint, max_rows=1)(**ASK, num_inference_steps=3, callback_on_step_end=fail)
    assert calls == [0]
    with pytest.raises(ValueError, match=r"callback_on_step_end_tensor_inputs: prompt_embeds cannot be had; there is 'latents'"):
        pipe(**ASK, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda latents: {"latents": latents[:, :1]}, r"returned latents of shape \(2, 1, 8, 8\); they must be \(2, \d+, 8, 8\)"),
        (lambda latents: {"latents": 3}, "returned latents of shape int"),
        (lambda latents: "yes", "returned 'yes'; it may return nothing, or a dictionary with 'latents'"),
        (lambda latents: {"prompt_embeds": latents}, "it may return nothing, or a dictionary with 'latents'"),
    ],
)
def test_what_a_callback_returns_is_checked(pipe, answer, message):
    with pytest.raises(ValueError, match=f"callback_on_step_end {message}" if message.startswith("returned") else message):
        pipe(**ASK, num_inference_steps=2, callback_on_step_end=lambda it, step, t, kwargs: answer(kwargs["latents"]))


def test_calls_of_several_threads_take_turns(checkpoint, pipe):
    shared, found, seen = fresh(checkpoint), {}, {1: set(), 2: set()}

    def call(n):
        watch = lambda it, step, t, kwargs: seen[n].add(len(kwargs["latents"])) or {}  # noqa: E731
        settings = {"num_inference_steps": 12, "seed": n, "num_images_per_prompt": n, "output_type": "latent"}
        found[n] = shared(**{**ASK, **settings}, callback_on_step_end=watch).images

    threads = [threading.Thread(target=call, args=(n,)) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in (1, 2):
        alone = pipe(**{**ASK, "num_inference_steps": 12, "seed": n, "num_images_per_prompt": n, "output_type": "latent"}).images
        assert torch.equal(found[n], alone)
        assert seen[n] == {n * len(ASK["prompt"])}


def test_a_callback_must_not_call_its_own_pipeline(checkpoint):
    shared = fresh(checkpoint)
    with pytest.raises(RuntimeError, match="a callback called the pipeline that it is called by"):
        shared(**ASK, callback_on_step_end=lambda it, *_: it(**ASK))
    assert len(shared(**ASK).images) == 2  # and it is as it was


def test_latents_are_what_the_picture_starts_from(pipe):
    from paris_ray.diffusion.sampler import initial_noise

    ask = {**ASK, "num_inference_steps": 2, "num_images_per_prompt": 2}
    noise = torch.stack([initial_noise(7, i, (4, 8, 8)) for i in range(4)])
    given = pipe(**ask, latents=noise.double()).images
    assert torch.equal(given, pipe(**{**ask, "seed": 7}).images)
    assert not torch.equal(given, pipe(**ask).images)
    for wrong in (noise[:3], noise[0], noise[:, :, :4], "noise"):
        with pytest.raises(ValueError, match=r"latents: .* must be a tensor \(N, C, h, w\) = \(4, 4, 8, 8\), a start for each picture"):
            pipe(**ask, latents=wrong)


def test_loading_options_are_passed_on_and_survive_a_move(checkpoint):
    other = ParisPipeline.from_pretrained(checkpoint, ignore_tensors=("x",), ignore_settings=("y",), norm_eps=0.01)
    for model in (other.model, other.to(torch.bfloat16).model):
        assert (model.ignore_tensors, model.ignore_settings, model.norm_eps) == (("x",), ("y",), 0.01)
        assert model.load_expert(0)[0].layers[0].norm1.eps == 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 512}, "height: 512 is not served; this model makes pictures of 16 pixels"),
        ({"output_type": "jpeg"}, "output_type: 'jpeg'"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: 2 for 1 prompts"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt: 0"),
        ({"seed": 1, "generator": torch.Generator()}, "seed and generator"),
        ({"generator": [torch.Generator()] * 3}, "generator: 3 of them for 1 pictures"),
        ({"routing": "top-9"}, "routing: 'top-9'"),
        ({"guidance_scale": 0.0}, "guidance_scale: 0.0"),
        ({"prompt": []}, r"prompt: \[\] must be a caption"),
    ],
)
def test_bad_arguments_are_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a fox", **arguments})
    assert pipe.engine.metrics["queued"] == 0


def test_the_rest_of_the_package_does_not_import_diffusers():
    code = (
        "import sys, pkgutil, importlib, paris_ray.inference as p;"
        "[importlib.import_module(f'paris_ray.inference.{m.name}') for m in pkgutil.iter_modules(p.__path__) if m.name != 'pipeline'];"
        "print('diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
