"""CLIP's text tower, with transformers' files and open_clip's network."""

from __future__ import annotations

import json
import os
import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from paris_ray.data.encoders import FrozenText, Ids, hub_file, weights_fingerprint
from paris_ray.headers import Shape, check_header, check_layers, read_header
from paris_ray.layout import TEXT_FILE

if TYPE_CHECKING:
    from torch import Tensor

_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
"""Parts of a layer, transformers' name → open_clip's. Queries, keys and values are three matrices there and one here."""


_BESIDE = re.compile(r"(.*\.)?position_ids|vision_.*|logit_scale|(text|visual)_projection\..*")
"""What a file may hold besides: a buffer of old versions, and the rest of a whole ``CLIPModel``."""

VOCABULARY = 49408


def clip_shapes(config: dict[str, Any]) -> dict[str, Shape]:
    """Tensors of a transformers ``CLIPTextModel``, without the prefix ``text_model.``, by its config."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, Shape] = {
        "embeddings.token_embedding.weight": (config["vocab_size"], width),
        "embeddings.position_embedding.weight": (config["max_position_embeddings"], width),
    }
    linear = {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner), **{f"self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")}}
    norms = ["final_layer_norm"]
    for here in (f"encoder.layers.{i}" for i in range(config["num_hidden_layers"])):
        norms += [f"{here}.layer_norm1", f"{here}.layer_norm2"]
        for name, shape in linear.items():
            shapes |= {f"{here}.{name}.weight": shape, f"{here}.{name}.bias": shape[:1]}
    return shapes | {f"{name}.{end}": (width,) for name in norms for end in ("weight", "bias")}


def read_clip(folder: str, where: str | None = None) -> tuple[dict[str, Any], dict[str, Shape]]:
    """What a folder holds, its weights unread: ``config.json`` in full, and the tensors of the text tower under the names in ``model.safetensors``.

    Args:
        folder: local.
        where: what messages call it, if not by its path.

    Raises:
        ValueError: a setting that open_clip's tower or tokenizer cannot express, or a tensor that is missing, misshapen or too many; names file
            and tensor.
    """
    where = where or folder
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    config = _settings(config.get("text_config", config), f"{where}/config.json")
    header = read_header(os.path.join(folder, TEXT_FILE), f"{where}/{TEXT_FILE}")
    check_layers(f"{where}/{TEXT_FILE}", header, config["num_hidden_layers"])
    prefix = "text_model." if any(name.startswith("text_model.") for name in header) else ""
    wanted = {prefix + name: shape for name, shape in clip_shapes(config).items()}
    check_header(f"{where}/{TEXT_FILE}", header, wanted, [name for name in header if _BESIDE.fullmatch(name)])
    return config, wanted


def _settings(config: dict[str, Any], where: str) -> dict[str, Any]:
    """A ``CLIPTextConfig`` in full."""
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    if missing := [key for key in sizes if key not in config]:
        raise ValueError(f"{where}: {', '.join(missing)} missing; it is not the config of a CLIPTextModel")
    full = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": config.get("hidden_act", "quick_gelu"),
        **{key: int(config[key]) for key in sizes},
        "max_position_embeddings": int(config.get("max_position_embeddings", 77)),
        "vocab_size": int(config.get("vocab_size", VOCABULARY)),
        "layer_norm_eps": config.get("layer_norm_eps", 1e-5),
        "projection_dim": int(config.get("projection_dim") or 768),
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407,
        "dtype": "float32",
    }
    for key, allowed in (("hidden_act", ("quick_gelu", "gelu")), ("layer_norm_eps", (1e-5,)), ("vocab_size", (VOCABULARY,))):
        if full[key] not in allowed:
            raise ValueError(f"{where}: {key} is {full[key]!r}; it must be {' or '.join(map(str, allowed))}. Choose another text encoder.")
    return full


def load_clip(folder: str, max_length: int, device: str, where: str | None = None) -> Clip:
    """From a local folder; arguments and errors as of :func:`read_clip` and :class:`Clip`."""
    from safetensors import safe_open

    config, wanted = read_clip(folder, where)
    if max_length > (positions := config["max_position_embeddings"]):
        raise ValueError(
            f"{where or folder}/config.json: max_position_embeddings is {positions}; it must be at least the max_length asked for, {max_length}. "
            "Ask for fewer tokens, or choose another text encoder."
        )
    with safe_open(os.path.join(folder, TEXT_FILE), framework="pt") as file:
        weights = {name.removeprefix("text_model."): file.get_tensor(name) for name in wanted}
    return Clip(config, weights, max_length, device)


def clip_to_open(weights: dict[str, Any], layers: int) -> dict[str, Any]:
    """Weights of a transformers ``CLIPTextModel`` under open_clip's names, in float32."""
    import torch

    source = {name: x.float() for name, x in weights.items()}
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


class Clip(FrozenText):
    """A CLIP text tower (Radford et al. 2021) through open_clip: causal mask, no padding mask, all states after the final norm.

    Captions are padded with the end-of-text token, as the released checkpoint's tokenizer does; a caption's length ends with its first one,
    and the state there is the pooled vector. States equal those of transformers' ``CLIPTextModel`` without a mask.

    Token ids equal those of transformers' ``CLIPTokenizer`` for plain captions, contractions, emoji, other scripts and captions that are too long.
    They differ where a caption needs cleaning: OpenAI's own cleaning, with which CLIP was trained, repairs mojibake, ligatures, curly quotes and
    control characters (ftfy) and resolves ``&amp;`` and its like, and transformers' does not. Of a caption cleaned beforehand both make the same. The
    other difference: the words ``<start_of_text>`` and ``<end_of_text>`` are special tokens here, ``<|startoftext|>`` and ``<|endoftext|>`` there.

    Args:
        config: as :func:`read_clip` gives it.
        weights: under transformers' names, without the prefix ``text_model.``.
        max_length: tokens, start and end included; at most the model's own.
        device: where it runs.
    """

    kind, pooling = "clip", "last"

    def __init__(self, config: dict[str, Any], weights: dict[str, Any], max_length: int, device: str = "cpu"):
        import torch
        from open_clip.transformer import LayerNorm, QuickGELU, TextTransformer

        self.layers, self.max_length, self.width = config["num_hidden_layers"], max_length, config["hidden_size"]
        self._config = {**config, "max_position_embeddings": max_length}
        model = TextTransformer(
            context_length=max_length,
            vocab_size=VOCABULARY,
            width=self.width,
            heads=config["num_attention_heads"],
            layers=self.layers,
            mlp_ratio=config["intermediate_size"] / self.width,
            proj_type="none",
            output_dim=None,
            act_layer=QuickGELU if config["hidden_act"] == "quick_gelu" else torch.nn.GELU,
            norm_layer=LayerNorm,
            output_tokens=True,
        )
        named = clip_to_open(weights, self.layers)
        named["positional_embedding"] = named["positional_embedding"][:max_length]
        model.load_state_dict(named, strict=True)
        super().__init__(model, device)
        self.fingerprint = weights_fingerprint(named)

    @cached_property
    def tokenizer(self) -> Any:
        from open_clip.tokenizer import SimpleTokenizer

        return SimpleTokenizer(context_length=self.max_length)

    def tokenize(self, captions: list[str]) -> tuple[Ids, Ids]:
        """N captions → ids (N, T) int32 and the index after the first end-of-text (N,) int32."""
        start, end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        ids = np.full((len(captions), self.max_length), end, np.int32)
        for row, caption in enumerate(captions):
            tokens = [start, *self.tokenizer.encode(caption)[: self.max_length - 2]]
            ids[row, : len(tokens)] = tokens
        return ids, (ids == end).argmax(1).astype(np.int32) + 1

    def count(self, captions: list[str]) -> list[int]:
        """How many tokens captions have before they are cut, start and end included."""
        return [len(self.tokenizer.encode(caption)) + 2 for caption in captions]

    def _states(self, ids: Tensor, lengths: Tensor) -> Tensor:
        states: Tensor = self.model(ids)[1]
        return states

    def save(self, folder: str) -> None:
        """Write ``text_encoder/`` and ``tokenizer/`` in transformers' layout."""
        from safetensors.torch import save_file

        encoder, tokenizer = os.path.join(folder, "text_encoder"), os.path.join(folder, "tokenizer")
        os.makedirs(encoder, exist_ok=True)
        os.makedirs(tokenizer, exist_ok=True)
        _write_json(os.path.join(encoder, "config.json"), self._config)
        save_file(open_to_clip(self.model.state_dict(), self.layers), os.path.join(encoder, TEXT_FILE), metadata={"format": "pt"})
        names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
        _write_json(os.path.join(tokenizer, "vocab.json"), {names.get(token, token): i for token, i in self.tokenizer.encoder.items()})
        with open(os.path.join(tokenizer, "merges.txt"), "w", encoding="utf-8") as file:
            file.write("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in self.tokenizer.bpe_ranks))
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


def clip_folder(source: str) -> str:
    """Local folder of the text tower that a folder or a repository of the hub holds. Raises ValueError."""
    if os.path.isdir(source):
        for folder in (source, os.path.join(source, "text_encoder")):
            if os.path.exists(os.path.join(folder, TEXT_FILE)) and os.path.exists(os.path.join(folder, "config.json")):
                return folder
        raise ValueError(
            f"{source} has no config.json and {TEXT_FILE}, in it or in its text_encoder/; save the model there with transformers' save_pretrained"
        )
    for prefix in ("", "text_encoder/"):
        config = hub_file(source, f"{prefix}config.json")
        weights = hub_file(source, f"{prefix}{TEXT_FILE}") if config else None
        if config and weights:
            return os.path.dirname(config)
    raise ValueError(f"{source!r} holds no config.json with a {TEXT_FILE}, at its top or in text_encoder/")
