"""Judges against torch-fidelity's and open_clip's own paths, with tiny encoders; nothing is fetched."""

from __future__ import annotations

import json
import sys

import numpy as np
import open_clip
import pytest
import torch
import torch_fidelity
from PIL import Image
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from paris_ray.config import ConfigError, OpenClipEmbedding
from paris_ray.evaluation import distances, judges

TINY_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PREPROCESS = {"size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": "shortest"}
CAPTIONS = ["a fox", "an owl at the top left", "a small egg on a blue ground", "", "nine words that say very little of any picture", "a fox", "key"]


class Tiny(FeatureExtractorBase):
    """Means and extremes of eight random filters."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **_):
        super().__init__(name, features_list)
        g = torch.Generator().manual_seed(0)
        self.kernels = torch.nn.Parameter(torch.randn(8, 3, 5, 5, generator=g))
        if feature_extractor_weights_path is not None:
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

    @staticmethod
    def get_provided_features_list():
        return ("sixteen",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "sixteen"

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, x):
        maps = torch.nn.functional.conv2d((x.float() - 128) / 128, self.kernels)
        return (torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1),)


torch_fidelity.register_feature_extractor("paris-test-tiny", Tiny)


class Pictures(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


@pytest.fixture(scope="module")
def pictures():
    # Smooth, as photographs are: on noise the two resizing filters differ.
    g = np.random.default_rng(0)
    small = torch.from_numpy(g.integers(0, 256, (230, 3, 4, 4)).astype(np.float32))
    large = torch.nn.functional.interpolate(small, size=(40, 40), mode="bicubic").clamp(0, 255)
    return large.round().byte().permute(0, 2, 3, 1).numpy()


def test_fid_and_kid_are_torch_fidelitys_from_end_to_end(pictures):
    real, made = pictures[:100], np.clip(pictures[130:] * 0.8 + 10, 0, 255).astype(np.uint8)
    judge = judges.Inception(extractor="paris-test-tiny")
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(real), input2=Pictures(made), fid=True, kid=True, feature_extractor="paris-test-tiny",
        kid_subset_size=len(made), kid_subsets=1, cuda=False, cache=False, verbose=False, save_cpu_ram=True,
    )  # fmt: skip
    assert distances.frechet_distance(judge(real), judge(made)) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert distances.Reference(judge(real)).kernel(judge(made)) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert theirs["frechet_inception_distance"] > 0.01
    assert "torch-fidelity" in judge.name
    assert "layer sixteen" in judge.name


def test_weights_come_from_a_file_of_tensors_and_of_nothing_else(tmp_path, pictures):
    torch.save({"kernels": torch.full((8, 3, 5, 5), 0.01)}, tmp_path / "weights.pth")
    given, own = judges.Inception(str(tmp_path / "weights.pth"), extractor="paris-test-tiny"), judges.Inception(extractor="paris-test-tiny")
    assert given.fingerprint != own.fingerprint
    np.testing.assert_allclose(given(pictures[:3])[:, 0], given(pictures[:3])[:, 1])  # all filters are alike
    torch.save({"kernels": print}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth holds more than tensors"):
        judges.Inception(str(tmp_path / "evil.pth"), extractor="paris-test-tiny")
    with pytest.raises(ValueError, match=r"gone.pth cannot be read"):
        judges.Inception(str(tmp_path / "gone.pth"), extractor="paris-test-tiny")


class Marks:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_planted_in_torchs_cache_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub/checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save({"kernels": Marks(tmp_path / "ran")}, cached)
    with pytest.raises(ValueError, match=r"has the SHA-256 [0-9a-f]{64}, not 6726825d.*fetched again"):
        judges.Inception()
    assert not (tmp_path / "ran").exists()
    assert judges.INCEPTION_SHA256.startswith(cached.stem.rpartition("-")[2])  # torch-fidelity names the file by its checksum


def test_weights_that_change_once_they_were_looked_at_are_not_read_again(tmp_path, monkeypatch):
    torch.save({"kernels": torch.zeros(8, 3, 5, 5)}, tmp_path / "weights.pth")
    load = torch.load

    def then_swapped(*args, **options):
        found = load(*args, **options)
        torch.save({"kernels": Marks(tmp_path / "ran")}, tmp_path / "weights.pth")
        return found

    monkeypatch.setattr(torch, "load", then_swapped)
    monkeypatch.setattr(Tiny, "load_state_dict", lambda self, state: None)
    monkeypatch.setattr(judges, "weights_fingerprint", lambda state: "")
    init = Tiny.__init__

    def unlimited(self, name, features, feature_extractor_weights_path=None, **options):
        load(feature_extractor_weights_path, weights_only=False)  # as torch-fidelity reads Inception's
        init(self, name, features, **options)

    monkeypatch.setattr(Tiny, "__init__", unlimited)
    judges.Inception(str(tmp_path / "weights.pth"), extractor="paris-test-tiny")
    assert not (tmp_path / "ran").exists()


def test_without_torch_fidelity_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.registry", None)
    with pytest.raises(ValueError, match=r"pip install 'paris_ray\[evaluation\]'"):
        judges.Inception()


def test_inception_itself_has_fids_layer_and_resize(tmp_path, monkeypatch, pictures):
    torch.save({}, tmp_path / "weights.pth")
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)  # random weights are enough for shapes
    judge = judges.Inception(str(tmp_path / "weights.pth"))
    assert judge.layer == "2048"
    assert judge(pictures[:2]).shape == (2, 2048)
    assert "299 pixels" in judge.resize


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A random CLIP on disk, as open_clip saves one for the hub."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    model = open_clip.model.CLIP(**TINY_CLIP).eval()
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_CLIP, "preprocess_cfg": PREPROCESS}))
    return model, folder


def test_clip_score_against_the_formula_on_open_clips_own_path(clip, pictures):
    model, folder = clip
    judge = judges.OpenClip(OpenClipEmbedding(model=f"local-dir:{folder}"))
    images = pictures[: len(CAPTIONS)]
    found = distances.clip_score(judge.images(images), judge.texts(CAPTIONS))
    transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")[2]
    tokens = open_clip.SimpleTokenizer(context_length=12)(CAPTIONS)
    with torch.no_grad():
        a = model.encode_image(torch.stack([transform(Image.fromarray(image)) for image in images])).numpy()
        b = model.encode_text(tokens).numpy()
    for i, score in enumerate(found):
        cosine = float(np.dot(a[i], b[i]) / np.linalg.norm(a[i]) / np.linalg.norm(b[i]))
        assert score == pytest.approx(100 * max(cosine, 0), abs=0.05)
    assert found.max() > 1
    np.testing.assert_allclose(np.linalg.norm(judge.texts(CAPTIONS), axis=1), 1, rtol=1e-5)
    assert "32 pixels" in judge.resize


@pytest.mark.parametrize(
    "text", [{"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}, {"tokenizer_kwargs": {"bpe_path": "/x"}}]
)
def test_a_clip_folder_runs_no_code_of_its_own(clip, tmp_path, text):
    """A tokenizer that transformers would import from the folder."""
    _, folder = clip
    (tmp_path / "open_clip_model.safetensors").symlink_to(folder / "open_clip_model.safetensors")
    described = {"model_cfg": {**TINY_CLIP, "text_cfg": {**TINY_CLIP["text_cfg"], **text}}, "preprocess_cfg": PREPROCESS}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    settings = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tok.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import PreTrainedTokenizer\nclass Mine(PreTrainedTokenizer): pass"
    (tmp_path / "tok.py").write_text(code)
    with pytest.raises(ConfigError, match=r"open_clip_config.json asks for a tokenizer of its own .* choose a CLIP"):
        judges.OpenClip(OpenClipEmbedding(model=f"local-dir:{tmp_path}"))
    assert not (tmp_path / "ran").exists()


def test_clip_score_is_a_cosine_cut_off_at_zero():
    images = np.array([[1.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    texts = np.array([[2.0, 0.0], [1.0, 0.0], [-1.0, 0.1]])
    np.testing.assert_allclose(distances.clip_score(images, texts), [100, 60, 0], atol=1e-5)
    with pytest.raises(ValueError, match="each picture needs its caption"):
        distances.clip_score(images, texts[:2])
