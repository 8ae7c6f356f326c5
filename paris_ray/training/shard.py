"""Training data: the rows of one shard, or of all, as compact tensors in an order that does not depend on how files were cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paris_ray.config import ConfigError
from paris_ray.data.encoders import FILE, NULL_TEXT, pool
from paris_ray.data.schema import read_columns
from paris_ray.manifest import StaleError, require
from paris_ray.storage import Folder
from paris_ray.training.checkpoint import read_tensors


@dataclass(frozen=True)
class Rows:
    """N rows in the order of their ids, on the CPU, as compact as on disk.

    Attributes:
        ids: (N,).
        latents: (N, C, H, W) float16.
        text: text states (N, T, D) float16, where the corpus stores states.
        token_ids: (N, T) int32, where it stores token ids.
        text_len: (N,) int64: real tokens of each caption.
        labels: (N,) int64: the expert whose shard the row is in.
    """

    ids: list[str]
    latents: Tensor
    text: Tensor | None
    token_ids: Tensor | None
    text_len: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Tensor) -> Rows:
        """Some of the rows."""
        text = None if self.text is None else self.text[rows]
        token_ids = None if self.token_ids is None else self.token_ids[rows]
        return Rows([self.ids[i] for i in rows.tolist()], self.latents[rows], text, token_ids, self.text_len[rows], self.labels[rows])


def read_rows(run: Folder, experts: Sequence[int], store_text: str) -> tuple[Rows, Rows]:
    """Training and validation rows of the shards of ``experts``.

    Args:
        run: the run directory; only ``shards/expert=K`` of these experts are read.
        experts: which shards.
        store_text: ``states`` or ``token_ids``, as in the config.

    Raises:
        ConfigError: there is no row to train on.
        StaleError: the shards are of different versions of the corpus, or a shard does not hold what its manifest counts.
    """
    text_column = "text" if store_text == "states" else "token_ids"
    folders = [run / "shards" / f"expert={k}" for k in experts]
    manifests = [require(folder, "partition") for folder in folders]
    if any(manifest["inputs"]["parents"] != manifests[0]["inputs"]["parents"] for manifest in manifests):
        raise StaleError(f"{run.uri}/shards are of different versions of the corpus: an append was cut off; finish it with python -m jobs.append")
    parts = [read_columns(folder, ["id", text_column, "text_len", "latent", "split"]) for folder in folders]
    for folder, manifest, part in zip(folders, manifests, parts, strict=True):
        found, counted = len(part["id"]), manifest["counts"]["rows"]
        if found != counted:
            raise StaleError(f"{folder.uri} holds {found} rows, its manifest counts {counted}; copy it anew, or pass --rebuild partition")
    labels = np.repeat(np.asarray(experts, np.int64), [len(part["id"]) for part in parts])
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(columns["id"].astype(str), kind="stable")
    text = torch.from_numpy(columns[text_column])
    everything = Rows(
        [str(i) for i in columns["id"]],
        torch.from_numpy(columns["latent"]),
        text if store_text == "states" else None,
        text if store_text == "token_ids" else None,
        torch.from_numpy(columns["text_len"].astype(np.int64)),
        torch.from_numpy(labels),
    )
    split = columns["split"].astype(str)[order]
    train, validation = (everything.take(torch.from_numpy(order[split == name])) for name in ("train", "validation"))
    if len(train) == 0:
        raise ConfigError(
            f"{run.uri}: the shards of experts {list(experts)} hold no row of the split 'train'; check data.split and partition.max_share"
        )
    return train, validation


class Encoders:
    """What ``RUN/encoders`` says and holds, for training.

    Args:
        run: the run directory.

    Attributes:
        meta: ``encoders.json``.
        null_states: text states of the empty caption, (T, D) float32.
        null_length: its real tokens.
    """

    def __init__(self, run: Folder):
        self.folder = run / "encoders"
        self.meta: dict[str, Any] = self.folder.read_json(FILE)
        null = read_tensors(self.folder, NULL_TEXT)
        self.null_states, self.null_length = null["states"].float(), int(null["length"][0])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""
        codec = self.meta["codec"]
        return codec["channels"], codec["latent_size"], codec["latent_size"]

    @property
    def text_width(self) -> int:
        return int(self.meta["text"]["width"])

    def null_pooled(self) -> Tensor:
        """Pooled text of the empty caption, (D,)."""
        return pool(self.null_states[None], torch.tensor([self.null_length]), self.meta["text"]["pooling"])[0]

    def text_encoder(self, device: torch.device) -> Any:
        """The frozen text encoder, on a device; needed only where the corpus stores token ids."""
        from paris_ray.data.text import load_text_encoder

        return load_text_encoder(self.folder.uri, self.meta["text"], str(device))

    def codec(self) -> Any:
        """The latent codec."""
        from paris_ray.data.codec import load_codec

        return load_codec(self.folder.uri, self.meta["codec"])
