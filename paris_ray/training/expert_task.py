"""What an expert learns, how it is watched, and what it hands over."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paris_ray import rng
from paris_ray.config import ConfigError, RunConfig
from paris_ray.diffusion.path import objective, training_times
from paris_ray.layout import EXPERT_FILE
from paris_ray.models.dit import DiT
from paris_ray.models.init_from import init_from
from paris_ray.stages import expert_name
from paris_ray.storage import Folder
from paris_ray.training import checkpoint, samples
from paris_ray.training.budget import Inputs, expert_flops
from paris_ray.training.checkpoint import tensor_bytes
from paris_ray.training.draws import Draw
from paris_ray.training.feed import Batch
from paris_ray.training.loop import TIME_BINS
from paris_ray.training.shard import Encoders, Rows, read_rows

VALIDATION_ROWS = 2048
"""At most this many validation rows are used, the first by id: more would cost time and add little."""


class ExpertTask:
    """Flow matching or noise prediction on one shard; see :class:`paris_ray.training.loop.Task`.

    Args:
        config: the run's config.
        k: which expert.
        device: where the model is.
        rank: which of the expert's workers this is; the first one reports.
    """

    def __init__(self, config: RunConfig, k: int, device: torch.device, rank: int = 0):
        self.config, self.k, self.device, self.rank = config, k, device, rank
        self.spec = config.experts[k]
        self.stage = expert_name(k)
        run = Folder(config.run_dir)
        self.folder = run / "experts" / str(k)
        self.encoders = Encoders(run)
        self.train, self.validation = read_rows(run, [k], config.data.store_text)
        self.rows, self.ids, self.dropout = len(self.train), self.train.ids, self.spec.caption_dropout
        # Rows in one pass of validation: the micro-batch, once it is settled.
        self.rows_at_once = self.spec.train.micro_batch if isinstance(self.spec.train.micro_batch, int) else self.spec.train.batch_size
        self.shape: tuple[int, ...] = self.encoders.latent_shape
        self.objective = objective(self.spec.objective, self.spec.noise_schedule)
        self.null = self.encoders.null_states.to(device)
        self.text_encoder = None if self.train.token_ids is None else self.encoders.text_encoder(device)
        self.flops = 3 * expert_flops(self.spec.model, Inputs.of(self.encoders.meta))
        self.model: nn.Module = self._model().to(device)

    def _model(self) -> DiT:
        channels, side, _ = self.shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.key(self.config.seed, "init", self.k))
            shape = self.spec.model.model_dump(exclude={"size"})
            model = DiT(image_size=side, in_channels=channels, out_channels=channels, text_embed_dim=self.encoders.text_width, **shape)
        # A resumed training has all weights in its checkpoint, and the source may be gone by then.
        if self.spec.init_from is not None and checkpoint.latest(self.folder) is None:
            try:
                report = init_from(model, self.spec.init_from)
            except (ValueError, FileNotFoundError) as error:
                raise ConfigError(f"experts.{self.k}.{error}") from error  # no further try would change it
            if self.rank == 0:
                self.folder.write_json("init.json", report.as_json())
                print(f"{self.stage}: {report}", flush=True)
        return model

    # -- the loop's task ----------------------------------------------------------------------------------------

    def batch(self, draw: Draw) -> Batch:
        """Latents, noises, uniform draws, drops and text of the rows drawn."""
        noise, u, dropped = (torch.from_numpy(a) for a in (draw.noise, draw.u, draw.dropped))
        return self._batch(
            self.train, torch.from_numpy(draw.rows), noise, training_times(u, self.spec.train.timesteps, self.spec.train.timestep_mean), dropped
        )

    def _batch(self, data: Rows, rows: Tensor, noise: Tensor, time: Tensor, dropped: Tensor) -> Batch:
        batch = {"latent": data.latents[rows], "noise": noise, "time": time, "dropped": dropped}
        if data.text is not None:
            return {**batch, "text": data.text[rows]}
        assert data.token_ids is not None
        return {**batch, "token_ids": data.token_ids[rows], "text_len": data.text_len[rows]}

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean squared error of each sample against the objective's target: (n,), and its time: (n,)."""
        x, time, target = self.objective.training_pair(batch["latent"].float(), batch["noise"], batch["time"])
        output = model(x, time, self.text(batch))
        return (output.float() - target).square().flatten(1).mean(1), batch["time"]

    @torch.no_grad()
    def text(self, batch: Batch) -> Tensor:
        """Text states, the empty caption's where it was dropped: (n, T, D) float32."""
        states = batch["text"].float() if self.text_encoder is None else self.text_encoder.encode(batch["token_ids"], batch["text_len"])
        return torch.where(batch["dropped"][:, None, None], self.null, states)

    def evaluate(self, images: int) -> dict[str, Any]:
        """Validation loss on fixed rows, noises and times, and a grid of samples."""
        figures = self.validate() if len(self.validation) else {}
        samples.write_grid(self, images)
        return figures

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """Loss on the validation rows at the middle of each time bin, with noises that are the same every time."""
        n, size = min(len(self.validation), VALIDATION_ROWS), self.rows_at_once
        sums: dict[int, float] = defaultdict(float)
        for start in range(0, n, size):
            rows = torch.arange(start, min(start + size, n))
            noise = torch.from_numpy(rng.normal(self.config.seed, f"{self.stage}/validation", rows.numpy(), self.shape))
            for b in range(TIME_BINS):
                time = torch.full((len(rows),), (b + 0.5) / TIME_BINS)
                batch = self._batch(self.validation, rows, noise, time, torch.zeros(len(rows), dtype=torch.bool))
                losses, _ = self.losses(self.model, {name: tensor.to(self.device) for name, tensor in batch.items()})
                sums[b] += losses.double().sum().item()
        by_time = [sums[b] / n for b in range(TIME_BINS)]
        return {"validation_loss": float(np.mean(by_time)), "validation_loss_by_time": by_time}

    # -- handing over -------------------------------------------------------------------------------------------

    def export_config(self) -> dict[str, Any]:
        """``config.json`` of the export: the released keys, and what they do not say."""
        model, spec = self.spec.model, self.spec
        return {
            "model_type": "dit_expert",
            "expert_id": self.k,
            "architecture": "dit",
            "hidden_size": model.hidden_size,
            "num_layers": model.num_layers,
            "num_heads": model.num_heads,
            "patch_size": model.patch_size,
            "in_channels": self.shape[0],
            "out_channels": self.shape[0],
            "mlp_ratio": model.mlp_ratio,
            "use_text_conditioning": True,
            "use_class_conditioning": False,
            "num_classes": 1000,
            "text_embed_dim": self.encoders.text_width,
            "use_dit_time_embed": True,
            "use_adaln_single": True,
            "cfg_dropout_prob": spec.caption_dropout,
            "image_size": self.shape[1],
            "norm_eps": model.norm_eps,
            "objective": spec.objective,
            "noise_schedule": spec.noise_schedule,
        }

    def export(self, weights: dict[str, Tensor]) -> None:
        """Write ``export/``: the averaged weights and their config, nothing that differs between runs that made the same weights."""
        out = self.folder / "export"
        out.write_bytes(EXPERT_FILE, tensor_bytes(weights))
        out.write_json("config.json", self.export_config())
