"""Expert and data: who knows which cluster, whom the router asks, and whether those it asks know more (arXiv 2602.02685). Imports torch, not Ray.

The paper looks at three things in a state on its way to a picture: whether those asked have the clusters nearest to it, whether they predict better
than those not asked, and whether pictures are worse where experts disagree. Here the states are those of rows that training did not see, on the
training path, where the true velocity is known. The second is the paper's, with its router, which does not read the caption. The first is of the
clean row, so it is the router's accuracy in other words, and in the third experts disagree about the row, not about the picture on its way: both are
ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load as load_safetensors
from torch import Tensor

from paris_ray.data.schema import read_columns
from paris_ray.diffusion.ensemble import Experts, ensemble_velocity, routing_weights
from paris_ray.diffusion.path import interpolate
from paris_ray.diffusion.routing import Routing
from paris_ray.diffusion.sampler import initial_noise
from paris_ray.evaluation.losses import conditioning
from paris_ray.evaluation.metrics import unit
from paris_ray.evaluation.times import TIMES
from paris_ray.inference.prompts import Prompts
from paris_ray.inference.weighing import Weigher
from paris_ray.inference.weights import ParisModel
from paris_ray.storage import Folder

_ROWS = 64


@torch.inference_mode()
def look(
    model: ParisModel, experts: Experts, captions: Sequence[str], latents: NDArray[np.float32], noises: Sequence[int], clusters: Sequence[int]
) -> dict[str, NDArray[np.float64]]:
    """What each expert, and each routing, makes of rows, without guidance.

    Args:
        model: the model.
        experts: its K experts, all there.
        captions: of the N rows.
        latents: clean latents (N, C, H, W).
        noises: seeds of the rows' noise.
        clusters: of the rows, for ``oracle``.

    Returns:
        ``experts`` (K, T, N): mean squared error of each expert's velocity at :data:`paris_ray.evaluation.times.TIMES`; ``router`` (T, N, K): its
        probabilities; ``disagreement`` (T, N): mean squared difference of the experts' velocities from their mean under these probabilities; and of
        each routing ``loss-<routing>`` (T, N).
    """
    k, n = model.num_experts, len(captions)
    prompts, weigher, available = Prompts(model), Weigher(model), torch.ones(k, dtype=torch.bool)
    routings = {str(one): one for one in [*(Routing("top", i) for i in range(1, min(3, k) + 1)), Routing("threshold"), Routing("full")]}
    found = {name: np.empty(shape) for name, shape in (("experts", (k, len(TIMES), n)), ("router", (len(TIMES), n, k)))}
    found |= {name: np.empty((len(TIMES), n)) for name in ("disagreement", "loss-oracle", *(f"loss-{name}" for name in routings))}
    for start in range(0, n, _ROWS):
        rows = slice(start, min(start + _ROWS, n))
        clean = torch.from_numpy(np.asarray(latents[rows], np.float32))
        noise = torch.stack([initial_noise(seed, 0, tuple(clean.shape[1:])) for seed in noises[rows]])
        cond, target = conditioning(model, prompts, captions[rows]), (noise - clean).to(model.device)
        for i, time in enumerate(TIMES):
            t = torch.full((len(clean),), time)
            x, t = interpolate(clean, noise, t).to(model.device), t.to(model.device)
            each = torch.stack([ensemble_velocity(x, t, cond, experts, torch.eye(k)[j].expand(len(clean), k)) for j in range(k)])  # (K, n, …)
            logits = weigher.logits(x, t, list(cond.pooled) if model.router_reads_text else [])
            p = torch.softmax(logits, 1)
            mean = _mixed(each, p)
            found["experts"][:, i, rows] = np.stack([_error(v, target) for v in each])
            found["router"][i, rows] = p.double().numpy()
            found["disagreement"][i, rows] = sum(p[:, j].double().numpy() * _error(v, mean) for j, v in enumerate(each))
            for name, routing in routings.items():
                found[f"loss-{name}"][i, rows] = _error(_mixed(each, routing_weights(logits, routing, available)), target)
            found["loss-oracle"][i, rows] = found["experts"][np.asarray(clusters[rows]), i, np.arange(rows.start, rows.stop)]
    return found


def _mixed(each: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("kn...,nk->n...", each, weights.to(each.device, each.dtype))


def _error(v: Tensor, target: Tensor) -> NDArray[np.float64]:
    return np.asarray((v - target).double().square().flatten(1).mean(1).cpu().numpy())


def cluster_ranks(run: Folder, ids: Sequence[str]) -> NDArray[np.int64]:
    """How near each cluster is to clean rows: ranks (N, K) of the cosine distance of their embeddings to the coarse centroids; 0 is the nearest.

    Args:
        run: with ``corpus/`` and ``clusters/`` of k-means.
        ids: of the rows.
    """
    columns = read_columns(run / "corpus", ["id", "embedding"])
    row_of = {str(name): row for row, name in enumerate(columns["id"])}
    own = unit(columns["embedding"][[row_of[name] for name in ids]].astype(np.float32))
    coarse = unit(load_safetensors((run / "clusters").read_bytes("centroids.safetensors"))["coarse"].astype(np.float32))
    return np.asarray((-own @ coarse.T).argsort(1, kind="stable").argsort(1, kind="stable"))
