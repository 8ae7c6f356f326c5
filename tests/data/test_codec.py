import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA

from paris_ray import config
from paris_ray.config import ConfigError, OpenMojiSource
from paris_ray.config import PatchPcaCodec as PcaConfig
from paris_ray.config import VaeCodec as VaeConfig
from paris_ray.data import codec as codecs
from paris_ray.data.codec import PatchPcaCodec, PatchSums, VaeCodec, build_vae, load_codec, patches, read_vae
from paris_ray.data.images import load_square
from paris_ray.data.openmoji import OpenMoji


@pytest.fixture(scope="module")
def pictures():
    source = OpenMoji(OpenMojiSource(emoji=40, grounds=("white", "blue")), 32)
    return np.stack([load_square(source.load(item).image, 32, 10**6)[0] for item in source.items()])


@pytest.fixture(scope="module")
def pca(pictures):
    return PatchPcaCodec.fit(PcaConfig(downsampling=4, channels=12), sums_of(pictures))


def sums_of(pictures, sizes=(80,)):
    total, start = PatchSums.zero(4), 0
    for size in sizes:
        part = PatchSums.zero(4)
        part.add(pictures[start : start + size], 4)
        total.merge(part)
        start += size
    assert start == len(pictures)
    return total


def brute_patches(pictures, d):
    """Patch by patch, in row-major order."""
    return np.stack(
        [[image[y : y + d, x : x + d].reshape(-1) for y in range(0, image.shape[0], d) for x in range(0, image.shape[1], d)] for image in pictures]
    )


def test_patches_against_a_loop(pictures):
    assert (patches(pictures[:3], 4) == brute_patches(pictures[:3], 4)).all()


def test_subspace_and_reconstruction_against_sklearn(pictures, pca):
    rows = brute_patches(pictures, 4).reshape(-1, 48) / 255
    reference = PCA(12, svd_solver="full").fit(rows)
    np.testing.assert_allclose(pca.weights["mean"], reference.mean_, atol=1e-6)
    mine, theirs = pca.weights["components"], reference.components_.T
    np.testing.assert_allclose(np.abs((mine * theirs).sum(0)), 1, atol=1e-4)  # the same axes, up to sign
    assert abs(pca.kept - reference.explained_variance_ratio_.sum()) < 1e-6
    wanted = reference.inverse_transform(reference.transform(rows)).clip(0, 1) * 255
    found = brute_patches(pca.decode(pca.encode(pictures)), 4).reshape(-1, 48)
    assert np.abs(found - wanted).max() <= 0.51


def test_latents_against_sklearn(pictures, pca):
    rows = brute_patches(pictures, 4).reshape(-1, 48) / 255
    reference = PCA(12, svd_solver="full").fit(rows)
    scores = reference.transform(rows) * np.sign((pca.weights["components"] * reference.components_.T).sum(0))
    # Divided by the root of each deviation, then by one number for unit variance of the whole.
    scores = scores / np.sqrt(scores.std(0))
    scores /= np.sqrt((scores**2).mean())
    latents = pca.encode(pictures).numpy()
    assert latents.shape == (80, 12, 8, 8)
    np.testing.assert_allclose(latents.transpose(0, 2, 3, 1).reshape(-1, 12), scores, atol=2e-3)
    assert abs(latents.std() - 1) < 1e-3


def test_sums_are_exact_whatever_their_order(pictures):
    whole = sums_of(pictures)
    for sizes in ((1, 79), (40, 40), (7, 3, 60, 10)):
        again = sums_of(pictures, sizes)
        assert again.count == whole.count
        assert (again.total == whole.total).all()
        assert (again.outer == whole.outer).all()
    exact = patches(pictures, 4).reshape(-1, 48).astype(np.int64)
    assert (whole.outer == exact.T @ exact).all()


def test_a_picture_has_the_same_bytes_alone_and_in_a_batch(pictures, pca):
    latents = pca.encode(pictures)
    assert torch.equal(torch.cat([pca.encode(pictures[i : i + 1]) for i in range(80)]), latents)
    decoded = pca.decode(latents)
    assert (np.concatenate([pca.decode(latents[i : i + 1]) for i in range(80)]) == decoded).all()
    assert (pca.decode(latents[[5, 60, 2]]) == decoded[[5, 60, 2]]).all()


def test_pca_save_and_load(pictures, pca, tmp_path):
    pca.save(str(tmp_path))
    again = load_codec(str(tmp_path), pca.meta())
    assert again.fingerprint == pca.fingerprint
    assert torch.equal(again.encode(pictures), pca.encode(pictures))
    assert torch.equal(load_codec(f"file://{tmp_path}", pca.meta()).encode(pictures), pca.encode(pictures))
    with pytest.raises(ValueError, match=r"has the fingerprint"):
        load_codec(str(tmp_path), {**pca.meta(), "fingerprint": "0" * 32})
    with pytest.raises(ValueError, match=r"known are patch_pca and vae"):
        load_codec(str(tmp_path), {"kind": "jpeg"})


def test_pca_errors_name_the_remedy(pictures):
    with pytest.raises(ConfigError, match=r"channels is 60.*at most 48"):
        PatchPcaCodec.fit(PcaConfig(channels=60), sums_of(pictures))
    flat = PatchSums.zero(4)
    flat.add(np.arange(8, dtype=np.uint8)[:, None, None, None].repeat(32, 1).repeat(32, 2).repeat(3, 3), 4)
    with pytest.raises(ConfigError, match=r"only 1 directions.*at most 1"):
        PatchPcaCodec.fit(PcaConfig(), flat)
    with pytest.raises(ConfigError, match=r"no picture to fit"):
        PatchPcaCodec.fit(PcaConfig(), PatchSums.zero(4))


# -- VAE ----------------------------------------------------------------------------------------------------------------
# The full-size weights of sd-vae-ft-mse are not available where these tests run. What follows is a tiny VAE of random weights in diffusers' own
# layout; at full size only names, shapes and the number of parameters are compared (tests/jobs/test_verify_release.py).


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3, "block_out_channels": (8, 8, 8)}
    AutoencoderKL(**blocks, latent_channels=4, norm_num_groups=4, scaling_factor=0.25, sample_size=32).save_pretrained(folder / "vae")
    return folder


def test_vae_against_diffusers(vae_folder, pictures):
    from diffusers import AutoencoderKL
    from diffusers.image_processor import VaeImageProcessor

    reference = AutoencoderKL.from_pretrained(vae_folder / "vae").eval()
    codec = build_vae(VaeConfig(source=str(vae_folder)))
    assert (codec.downsampling, codec.channels, codec.scaling_factor) == (4, 4, 0.25)
    batch = pictures[:6]
    with torch.no_grad():
        prepared = VaeImageProcessor(vae_scale_factor=4).preprocess(list(batch / np.float32(255)))
        posterior = reference.encode(prepared).latent_dist
        latents = codec.encode(batch)
        torch.testing.assert_close(latents, posterior.mean * 0.25, atol=1e-5, rtol=1e-4)
        decoded = VaeImageProcessor().postprocess(reference.decode(posterior.mean).sample, output_type="np")
    assert np.abs(codec.decode(latents).astype(int) - (decoded * 255).round().astype(int)).max() <= 1
    assert latents.shape == (6, 4, 8, 8)


def test_vae_has_the_same_bytes_alone_and_in_a_batch(vae_folder, pictures):
    codec = build_vae(VaeConfig(source=str(vae_folder)))
    latents = codec.encode(pictures[:5])
    assert torch.equal(codec.encode(pictures[3:4]), latents[3:4])
    assert (codec.decode(latents[3:4]) == codec.decode(latents)[3:4]).all()


def test_vae_save_load_and_own_scaling(vae_folder, pictures, tmp_path):
    codec = build_vae(VaeConfig(source=str(vae_folder / "vae"), scaling_factor=0.5))
    codec.save(str(tmp_path))
    assert sorted(path.name for path in (tmp_path / "vae").iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    again = load_codec(str(tmp_path), codec.meta())
    assert isinstance(again, VaeCodec)
    assert torch.equal(again.encode(pictures[:2]), codec.encode(pictures[:2]))
    np.testing.assert_allclose(again.encode(pictures[:2]), 2 * build_vae(VaeConfig(source=str(vae_folder))).encode(pictures[:2]), rtol=1e-6)


def test_a_vae_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"data.codec.source.*holds no AutoencoderKL"):
        build_vae(VaeConfig(source=str(tmp_path)))


def test_a_pickled_vae_is_refused(vae_folder, tmp_path):
    import shutil

    shutil.copytree(vae_folder, tmp_path / "m")
    weights = tmp_path / "m/vae/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ConfigError, match=r"safetensors"):
        build_vae(VaeConfig(source=str(tmp_path / "m")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("decoder.conv_out.bias"), r"tensor decoder\.conv_out\.bias \(3,\) is missing from the file"),
        (lambda t: t.update(loss=torch.zeros(1)), r"tensor loss is in the file but not in the network"),
        (
            lambda t: t.update({"encoder.conv_in.weight": torch.zeros(8, 4, 3, 3)}),
            r"tensor encoder\.conv_in\.weight has shape \(8, 4, 3, 3\) in the file, \(8, 3, 3, 3\) in",
        ),
    ],
)
def test_a_vae_that_is_not_whole_is_refused_by_name(vae_folder, tmp_path, change, message):
    """diffusers only warns of the first two, leaves what is missing at random values, and draws."""
    import shutil

    shutil.copytree(vae_folder, tmp_path / "m")
    file = tmp_path / "m/vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    meta = {**build_vae(VaeConfig(source=str(vae_folder))).meta(), "fingerprint": None}
    with pytest.raises(ValueError, match=message) as caught:
        load_codec(str(tmp_path / "m"), meta)
    assert str(caught.value).startswith(f"{file} does not fit the config.json beside it")
    with pytest.raises(ConfigError, match=rf"data.codec.source: .*/m/vae/diffusion_pytorch_model.safetensors does not fit(.|\n)*{message}"):
        build_vae(VaeConfig(source=str(tmp_path / "m")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_per_block": 10**9}, r"there are \d+ tensors in the file, 3000000000 layers in the network"),
        ({"block_out_channels": [8, 8, 1 << 20]}, r"tensor encoder\.\S+ \(1048576, 8, 1, 1\) is missing from the file"),
        ({"norm_num_groups": 0}, r"vae/config.json: "),
    ],
)
def test_a_vaes_config_takes_no_memory_that_its_file_has_not(vae_folder, tmp_path, monkeypatch, changes, message):
    import json
    import shutil

    from diffusers import AutoencoderKL

    shutil.copytree(vae_folder, tmp_path / "m")
    config = json.loads((tmp_path / "m/vae/config.json").read_text())
    (tmp_path / "m/vae/config.json").write_text(json.dumps({**config, **changes}))
    meta = {**build_vae(VaeConfig(source=str(vae_folder))).meta(), "fingerprint": None}
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", lambda *a, **k: pytest.fail("made"))
    with pytest.raises(ValueError, match=message):
        load_codec(str(tmp_path / "m"), meta)
    (tmp_path / "m/vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no AutoencoderKL with safetensors weights"):
        load_codec(str(tmp_path / "m"), meta)


def test_header_of_a_vae_against_its_config(vae_folder, tmp_path):
    """As it is, under the names that the attention had before diffusers 0.12, and with a tensor too few, too many and of another shape."""
    import shutil

    from diffusers import AutoencoderKL

    wanted = {name: tuple(x.shape) for name, x in AutoencoderKL.from_pretrained(vae_folder / "vae").state_dict().items()}
    assert read_vae(str(vae_folder / "vae")) == wanted
    shutil.copytree(vae_folder / "vae", tmp_path / "vae")
    file = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = dict(tensors)
    for new, before in old.items():
        renamed = {name.replace(f".{new}.", f".{before}."): tensor for name, tensor in renamed.items()}
    assert len(renamed.keys() - tensors.keys()) == 16  # weights and biases of four parts, in encoder and decoder
    save_file(renamed, file)
    assert read_vae(str(tmp_path / "vae")) == wanted
    load_codec(str(tmp_path), build_vae(VaeConfig(source=str(vae_folder))).meta())
    del renamed["encoder.conv_in.bias"]
    save_file({**renamed, "loss": torch.zeros(1), "decoder.conv_in.bias": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"encoder\.conv_in\.bias \(8,\) is missing") as caught:
        read_vae(str(tmp_path / "vae"), "the VAE")
    assert str(caught.value).startswith("the VAE/diffusion_pytorch_model.safetensors does not fit")
    assert "tensor loss is in the file but not in the network" in str(caught.value)
    assert "tensor decoder.conv_in.bias has shape (3,) in the file, (8,) in the network" in str(caught.value)


def test_the_driver_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, paris_ray.data.embed, paris_ray.data.part; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'diffusers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert codecs.PatchPcaCodec.kind == config.PatchPcaCodec().kind
