"""What the router learns, how it is watched, and what it hands over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paris_ray import rng
from paris_ray.config import ConfigError, RunConfig
from paris_ray.data.encoders import pool
from paris_ray.diffusion.path import interpolate, training_times
from paris_ray.evaluation.metrics import calibration_error
from paris_ray.inference.strict import load_router
from paris_ray.layout import ROUTER_FILE, router_config
from paris_ray.models.router import Router, with_more_clusters
from paris_ray.stages import CONTROL_ROUTER
from paris_ray.storage import Folder
from paris_ray.training import checkpoint
from paris_ray.training.budget import Inputs, router_flops
from paris_ray.training.checkpoint import tensor_bytes
from paris_ray.training.draws import Draw
from paris_ray.training.feed import Batch
from paris_ray.training.loop import TIME_BINS
from paris_ray.training.shard import Encoders, Rows, read_rows

VALIDATION_ROWS = 8192
"""At most this many validation rows are used, the first by id."""


class RouterTask:
    """Cross-entropy against the cluster, from a state of the linear path, its time and pooled text; see :class:`paris_ray.training.loop.Task`.

    Args:
        config: the run's config.
        device: where the model is.
        control: train the text-blind control router instead.
    """

    def __init__(self, config: RunConfig, device: torch.device, control: bool = False):
        self.config, self.device, self.spec = config, device, config.router
        self.stage = CONTROL_ROUTER if control else "router"
        self.reads_text = not control and self.spec.text == "pooled"
        run = Folder(config.run_dir)
        self.folder = run / self.stage
        self.encoders = Encoders(run)
        self.train, self.validation = read_rows(run, range(config.num_experts), config.data.store_text)
        self.rows, self.ids = len(self.train), self.train.ids
        # Rows in one pass of validation: the micro-batch, once it is settled.
        self.rows_at_once = self.spec.train.micro_batch if isinstance(self.spec.train.micro_batch, int) else self.spec.train.batch_size
        self.shape: tuple[int, ...] = self.encoders.latent_shape
        self.dropout = self.spec.caption_dropout if self.reads_text else 0.0
        inputs = Inputs.of(self.encoders.meta)
        inputs = inputs if self.reads_text else replace(inputs, text_width=0)
        self.flops = 3 * router_flops(self.spec.model, inputs, config.num_experts)
        self.null = self.encoders.null_pooled().to(device)
        self.pooling = self.encoders.meta["text"]["pooling"]
        self.text_encoder = self.encoders.text_encoder(device) if self.reads_text and self.train.token_ids is not None else None
        channels, side, _ = self.shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.key(config.seed, "init", self.stage))
            shape = self.spec.model.model_dump(exclude={"size"})
            width = self.encoders.text_width if self.reads_text else None
            model = Router(config.num_experts, side, in_channels=channels, text_embed_dim=width, **shape)
        # A resumed training has all weights in its checkpoint, and the source may be gone by then.
        if not control and self.spec.init_from is not None and checkpoint.latest(self.folder) is None:
            start_from(model, self.spec.init_from, side)
        self.model = model.to(device)

    # -- the loop's task ----------------------------------------------------------------------------------------

    def batch(self, draw: Draw) -> Batch:
        """Latents, noises, times, drops, clusters and text of the rows drawn."""
        noise, u, dropped = (torch.from_numpy(a) for a in (draw.noise, draw.u, draw.dropped))
        return self._batch(
            self.train, torch.from_numpy(draw.rows), noise, training_times(u, self.spec.train.timesteps, self.spec.train.timestep_mean), dropped
        )

    def _batch(self, data: Rows, rows: Tensor, noise: Tensor, time: Tensor, dropped: Tensor) -> Batch:
        batch = {"latent": data.latents[rows], "noise": noise, "time": time, "dropped": dropped, "label": data.labels[rows]}
        if not self.reads_text:
            return batch
        if data.text is not None:
            return {**batch, "pooled": pool(data.text[rows].float(), data.text_len[rows], self.pooling)}
        assert data.token_ids is not None
        return {**batch, "token_ids": data.token_ids[rows], "text_len": data.text_len[rows]}

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        x = interpolate(batch["latent"].float(), batch["noise"], batch["time"])  # (n, C, H, W)
        logits = model(x, batch["time"], self._pooled(batch)) if self.reads_text else model(x, batch["time"])
        return logits.float()  # (n, K)

    @torch.no_grad()
    def _pooled(self, batch: Batch) -> Tensor:
        """Pooled text, the empty caption's where it was dropped: (n, D)."""
        pooled = batch.get("pooled")
        if pooled is None:
            assert self.text_encoder is not None
            pooled = pool(self.text_encoder.encode(batch["token_ids"], batch["text_len"]), batch["text_len"], self.pooling)
        return torch.where(batch["dropped"][:, None], self.null, pooled)

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each sample: (n,), and its time: (n,)."""
        return F.cross_entropy(self._logits(model, batch), batch["label"], reduction="none"), batch["time"]

    def evaluate(self, images: int) -> dict[str, Any]:
        """Loss, accuracy and calibration error on the validation rows at the middle of each time bin, with noises that are the same every time.

        With the captions, and ``without_text`` where captions are read at all; beside them the accuracy of the ``prior``, always naming the largest
        cluster.
        """
        if len(self.validation) == 0:
            return {}
        by_time = self._judge(without_text=False)
        largest = torch.bincount(self.train.labels).argmax()
        return {
            **{f"validation_{name}" if name == "loss" else name: sum(values) / TIME_BINS for name, values in by_time.items()},
            **{f"validation_{name}_by_time" if name == "loss" else f"{name}_by_time": values for name, values in by_time.items()},
            "prior": (self.validation.labels[:VALIDATION_ROWS] == largest).double().mean().item(),
            **({"without_text": {f"{name}_by_time": values for name, values in self._judge(without_text=True).items()}} if self.reads_text else {}),
        }

    @torch.no_grad()
    def _judge(self, without_text: bool) -> dict[str, list[float]]:
        """Mean loss, accuracy and expected calibration error of each time bin."""
        n, size = min(len(self.validation), VALIDATION_ROWS), self.rows_at_once
        loss = torch.zeros(TIME_BINS, n, dtype=torch.float64)
        confidence, right = torch.zeros(TIME_BINS, n), torch.zeros(TIME_BINS, n, dtype=torch.bool)
        for start in range(0, n, size):
            rows = torch.arange(start, min(start + size, n))
            noise = torch.from_numpy(rng.normal(self.config.seed, f"{self.stage}/validation", rows.numpy(), self.shape))
            for b in range(TIME_BINS):
                time = torch.full((len(rows),), (b + 0.5) / TIME_BINS)
                batch = self._batch(self.validation, rows, noise, time, torch.full((len(rows),), without_text))
                batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
                logits = self._logits(self.model, batch)
                most, named = logits.softmax(1).max(1)
                loss[b, rows] = F.cross_entropy(logits, batch["label"], reduction="none").double().cpu()
                confidence[b, rows], right[b, rows] = most.cpu(), (named == batch["label"]).cpu()
        return {
            "loss": loss.mean(1).tolist(),
            "accuracy": right.double().mean(1).tolist(),
            "ece": [calibration_error(c, r) for c, r in zip(confidence.numpy(), right.numpy(), strict=True)],
        }

    # -- handing over -------------------------------------------------------------------------------------------

    def export(self, weights: dict[str, Tensor]) -> None:
        """Write ``export/``: the averaged weights and their config."""
        out = self.folder / "export"
        out.write_bytes(ROUTER_FILE, tensor_bytes(weights))
        out.write_json("config.json", router_config(self.model))


def start_from(model: Router, source: str, side: int) -> None:
    """Give a router the weights of another, which may know fewer clusters.

    Args:
        model: it.
        source: ``router.init_from``: a folder with ``config.json`` and weights.
        side: of the latent.

    Raises:
        ConfigError: nothing is there, or it has another shape or knows more clusters.
    """
    try:
        before = load_router(Folder(source), side)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"router.init_from: {error}") from error
    if before.num_clusters > model.num_clusters:
        raise ConfigError(f"router.init_from: {source} knows {before.num_clusters} experts, the run has {model.num_clusters}; take one of no more")
    weights = with_more_clusters(before.state_dict(), model.num_clusters)
    own = model.state_dict()
    if unlike := [name for name in {**own, **weights} if name not in own or name not in weights or own[name].shape != weights[name].shape]:
        raise ConfigError(
            f"router.init_from: {source} has another shape than router.model and router.text ({', '.join(sorted(unlike)[:3])} …); give it the same"
        )
    model.load_state_dict(weights)
