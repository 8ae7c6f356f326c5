"""The diffusers pipeline gives the engine's pictures, in diffusers' words."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import released
import torch

from paris_ray.inference.engine import ImageRequest, generate
from paris_ray.inference.pipeline import ParisPipeline
from paris_ray.inference.weights import load_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("released") / "model"
    released.write_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def pipe(checkpoint):
    pipe = ParisPipeline.from_pretrained(checkpoint)
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
    other = ParisPipeline.from_pretrained(checkpoint, max_resident=2)
    other.set_progress_bar_config(disable=True)
    other.enable_model_cpu_offload()
    assert torch.equal(other(**ask).images, pipe(**ask).images)
    assert sum(other.engine.experts.resident) == 1
    assert other.to("cpu") is other
    other.to(torch.bfloat16)
    assert other.dtype == torch.bfloat16
    near = other(**ask).images
    assert not torch.equal(near, pipe(**ask).images)
    assert (near - pipe(**ask).images).norm() / near.norm() < 0.1
    assert ParisPipeline.from_pretrained(checkpoint, torch.bfloat16).model.precision == "bf16"
    with pytest.raises(ValueError, match="float16"):
        other.to(torch.float16)
    with pytest.raises(ValueError, match="float16"):
        ParisPipeline.from_pretrained(checkpoint, torch_dtype=torch.float16)


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
        ({"prompt": []}, "prompts"),
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
