import numpy as np
import pytest
import timm
import torch

from paris_ray.config import ConfigError, OpenClipEmbedding, PackagedEmbedding, TimmEmbedding
from paris_ray.data import embedding
from paris_ray.data.embedding import build_embedder

DINO = "vit_small_patch14_dinov2.lvd142m"


@pytest.fixture(scope="module")
def pictures():
    # Smooth, as photographs are: on noise the two resizing filters differ.
    g = np.random.default_rng(0)
    small = torch.from_numpy(g.integers(0, 256, (11, 3, 4, 4)).astype(np.float32))
    large = torch.nn.functional.interpolate(small, size=(56, 56), mode="bicubic").clamp(0, 255)
    return large.round().byte().permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def lite0():
    return build_embedder(PackagedEmbedding())


def test_lite0_recognises_photographs():
    """With ImageNet's head back on, the weights loaded by order name what they see; a wrong order or scale would not."""
    import matplotlib.cbook
    import sklearn.datasets
    from PIL import Image

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(embedding._lite0_weights(model), strict=True)
    model.eval()
    photographs = {
        "military uniform": (Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg")), {652}),
        "palace, monastery, stupa": (Image.fromarray(sklearn.datasets.load_sample_image("china.jpg")), {442, 663, 698, 832}),
        "daisy": (Image.fromarray(sklearn.datasets.load_sample_image("flower.jpg")), {985}),
    }
    for name, (photograph, classes) in photographs.items():
        pixels = torch.from_numpy(np.array(photograph.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)))
        with torch.no_grad():
            found = model(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1).topk(3).indices[0].tolist()
        assert classes & set(found), name


def test_lite0_against_timm(lite0, pictures):
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=1000)
    model.load_state_dict(embedding._lite0_weights(model))
    model.eval()
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    pixels = torch.nn.functional.interpolate(pixels, size=(96, 96), mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1
    with torch.no_grad():
        wanted = model.forward_head(model.forward_features(pixels), pre_logits=True)
    np.testing.assert_allclose(lite0(pictures), wanted.numpy(), atol=1e-4, rtol=1e-3)
    assert lite0.width == 1280


def test_a_picture_has_the_same_bytes_alone_and_in_a_batch(lite0, pictures):
    batch = lite0(pictures)
    assert (np.concatenate([lite0(pictures[i : i + 1]) for i in range(len(pictures))]) == batch).all()
    assert lite0(pictures[:0]).shape == (0, 1280)


def test_altered_weights_are_not_unpickled(monkeypatch):
    monkeypatch.setattr(embedding, "LITE0_SHA256", "0" * 64)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("unpickled"))
    with pytest.raises(ConfigError, match=r"has the SHA-256 5793"):
        build_embedder(PackagedEmbedding())


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model(DINO, pretrained=False, num_classes=0, depth=2).eval()
    path = tmp_path_factory.mktemp("dino") / "dino.safetensors"
    save_file(model.state_dict(), path)
    return model, str(path)


def test_dinov2_against_timm_and_its_own_transform(dino, pictures, monkeypatch):
    model, path = dino
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, depth=2, **options))  # two of twelve layers
    embedder = build_embedder(TimmEmbedding(model=DINO, weights=path, image_size=112))
    assert embedder.width == 384
    found = embedder(pictures[:3])
    from PIL import Image

    sized = create(DINO, pretrained=False, num_classes=0, depth=2, dynamic_img_size=True).eval()
    sized.load_state_dict(model.state_dict())
    config = timm.data.resolve_model_data_config(sized)
    transform = timm.data.create_transform(**{**config, "input_size": (3, 112, 112), "crop_pct": 1.0})
    with torch.no_grad():
        wanted = sized(torch.stack([transform(Image.fromarray(image)) for image in pictures[:3]])).numpy()
    cosine = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    assert cosine.min() > 0.9999
    assert (np.concatenate([embedder(pictures[i : i + 1]) for i in range(3)]) == found).all()


def test_errors_name_the_remedy(tmp_path, dino):
    with pytest.raises(ConfigError, match=r"data.embedding.model.*no_such_model"):
        build_embedder(TimmEmbedding(model="no_such_model", weights="x.safetensors"))
    with pytest.raises(ConfigError, match=r"only .safetensors"):
        build_embedder(TimmEmbedding(model=DINO, weights="weights.pth"))
    with pytest.raises(ConfigError, match=r"does not fit"):
        build_embedder(TimmEmbedding(model="resnet18", weights=dino[1]))
    with pytest.raises(ConfigError, match=r"could not be fetched.*data.embedding.weights"):
        build_embedder(TimmEmbedding(model="resnet18.a1_in1k"))


def test_a_folder_of_timms_brings_safetensors_or_is_refused(tmp_path, pictures, monkeypatch):
    from safetensors.torch import save_file

    torch.manual_seed(1)
    model = timm.create_model("resnet10t", pretrained=False).eval()
    (tmp_path / "config.json").write_text('{"architecture": "resnet10t", "num_classes": 1000}')
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(embedding, "hub_file", lambda place, name: str(tmp_path / name) if (tmp_path / name).exists() else None)
    config = TimmEmbedding(model=f"local-dir:{tmp_path}", image_size=56)
    with monkeypatch.context() as watched:
        watched.setattr(torch, "load", lambda *a, **k: pytest.fail("unpickled"))
        for name in (config.model, "hf-hub:somebody/model", "HF_hub:somebody/model"):
            with pytest.raises(ConfigError, match=r"has no model.safetensors, and pickles are not read here.*jobs.convert"):
                build_embedder(config.model_copy(update={"model": name}))
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        embedder = build_embedder(config)
    assert embedder(pictures[:2]).shape == (2, 512)
    state = embedder.model.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items() if not name.startswith("fc."))


# -- open_clip ----------------------------------------------------------------------------------------------------------

TINY_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}
PREPROCESS = {"size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": "shortest"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A random CLIP on disk, as open_clip saves one for the hub."""
    import json

    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    model = open_clip.model.CLIP(**TINY_CLIP).eval()
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_CLIP, "preprocess_cfg": PREPROCESS}))
    return model, folder


def test_open_clip_against_its_own_encode_image(clip, pictures):
    import open_clip
    from PIL import Image

    model, folder = clip
    embedder = build_embedder(OpenClipEmbedding(model=f"local-dir:{folder}"))
    assert (embedder.kind, embedder.width, embedder.image_size) == ("open_clip", 24, 32)
    found = embedder(pictures)
    transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")[2]
    with torch.no_grad():
        wanted = model.encode_image(torch.stack([transform(Image.fromarray(image)) for image in pictures])).numpy()
    cosine = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    assert cosine.min() > 0.9999
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.linalg.norm(wanted, axis=1), rtol=0.01)
    assert (np.concatenate([embedder(pictures[i : i + 1]) for i in range(len(pictures))]) == found).all()


def test_open_clip_by_architecture_and_by_repository(clip, pictures, monkeypatch):
    import open_clip

    _, folder = clip
    local = build_embedder(OpenClipEmbedding(model=f"local-dir:{folder}"))
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", TINY_CLIP)
    named = build_embedder(OpenClipEmbedding(model="tiny-clip", weights=str(folder / "open_clip_model.safetensors")))
    assert named.fingerprint == local.fingerprint
    monkeypatch.setattr(embedding, "hub_file", lambda repository, name: str(folder / name) if repository == "somebody/tiny" else None)
    assert build_embedder(OpenClipEmbedding(model="hf-hub:somebody/tiny")).fingerprint == local.fingerprint
    with pytest.raises(ConfigError, match=r"nobody/none has no open_clip_config.json and open_clip_model.safetensors"):
        build_embedder(OpenClipEmbedding(model="hf-hub:nobody/none"))


def test_open_clip_reads_no_pickle_and_errors_name_the_remedy(clip, tmp_path, monkeypatch):
    import shutil

    _, folder = clip
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("unpickled"))
    shutil.copy(folder / "open_clip_config.json", tmp_path)
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"has no open_clip_model.safetensors"):
        build_embedder(OpenClipEmbedding(model=f"local-dir:{tmp_path}"))
    for weights in (None, "openai", str(tmp_path / "open_clip_pytorch_model.bin"), str(tmp_path / "gone.safetensors")):
        with pytest.raises(ConfigError, match=r"data.embedding.weights is .*name a local .safetensors file of ViT-B-32"):
            build_embedder(OpenClipEmbedding(model="ViT-B-32", weights=weights))
    own = str(folder / "open_clip_model.safetensors")
    with pytest.raises(ConfigError, match=r"open_clip knows no 'ViT-Q'"):
        build_embedder(OpenClipEmbedding(model="ViT-Q", weights=own))
    with pytest.raises(ConfigError, match=r"brings its own; leave it out"):
        build_embedder(OpenClipEmbedding(model=f"local-dir:{folder}", weights=own))
    described = '{"model_cfg": {"text_cfg": {"hf_model_name": "somebody/code"}}}'
    (tmp_path / "open_clip_config.json").write_text(described)
    shutil.copy(own, tmp_path)
    with pytest.raises(ConfigError, match=r"a text tower from elsewhere, 'somebody/code'"):
        build_embedder(OpenClipEmbedding(model=f"local-dir:{tmp_path}"))
    (tmp_path / "open_clip_config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"describes no model: RecursionError"):
        build_embedder(OpenClipEmbedding(model=f"local-dir:{tmp_path}"))
    with pytest.raises(ConfigError, match=r"open_clip cannot make RN50"):
        build_embedder(OpenClipEmbedding(model="RN50", weights=own))
