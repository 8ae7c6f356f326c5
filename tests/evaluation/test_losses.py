"""Held-out losses and routers by time against loops over single rows."""

from __future__ import annotations

import math

import fabricated
import numpy as np
import pytest
import torch

from paris_ray.diffusion.path import as_velocity
from paris_ray.diffusion.sampler import initial_noise
from paris_ray.evaluation import classifiers, losses, routers
from paris_ray.evaluation.times import TIMES
from paris_ray.inference.experts import LocalExperts

tiny_model = fabricated.tiny_model
N, SEEDS = 70, [7 * i + 1 for i in range(70)]
CAPTIONS = [f"thing {i % 9} on a wall" for i in range(N)]
LATENTS = np.random.default_rng(0).normal(size=(N, tiny_model.CHANNELS, tiny_model.SIZE, tiny_model.SIZE)).astype(np.float32)
CLUSTERS = [i * i % 4 for i in range(N)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    return tiny_model.open_model(path, tiny_model.write_model(path))


def noise(i):
    return initial_noise(SEEDS[i], 0, LATENTS.shape[1:])


def test_the_loss_of_what_is_known():
    clean = torch.from_numpy(LATENTS)
    own = torch.stack([noise(i) for i in range(N)])
    true = losses.flow_losses(lambda x, t, rows: own[list(rows)] - clean[list(rows)], LATENTS, SEEDS)
    assert true.shape == (len(TIMES), N)
    assert true.max() == 0
    # Nothing is said: the mean square of the target. Half of it: a quarter.
    none = losses.flow_losses(lambda x, t, rows: torch.zeros_like(x), LATENTS, SEEDS)
    for i in (0, 65):
        assert none[:, i] == pytest.approx(float((noise(i).double() - clean[i].double()).square().mean()), rel=1e-6)
    half = losses.flow_losses(lambda x, t, rows: (own[list(rows)] - clean[list(rows)]) / 2, LATENTS, SEEDS, times=(0.5,))
    np.testing.assert_allclose(half[0], none[0] / 4, rtol=1e-5)
    # The state that is shown is the path's.
    back = losses.flow_losses(lambda x, t, rows: (own[list(rows)] - x) / (1 - t.view(-1, 1, 1, 1)), LATENTS, SEEDS, times=(0.25, 0.5))
    assert back.max() < 1e-9


def single(model, k, i, t):
    """One expert on one row, alone, in plain torch."""
    module, objective = model.load_expert(k)
    ids, lengths = model.text_encoder.tokenize([CAPTIONS[i]])
    states = model.text_encoder.encode(ids, lengths)
    clean, own = torch.from_numpy(LATENTS[i])[None], noise(i)[None]
    with torch.no_grad():
        found = as_velocity(module, objective)((1 - t) * clean + t * own, torch.tensor([t]), states)
    return found, own - clean


def test_an_expert_alone_says_what_plain_torch_does(model):
    for k in range(model.num_experts):
        found = losses.flow_losses(losses.routed_velocity(model, LocalExperts(model), CAPTIONS, f"expert-{k}"), LATENTS, SEEDS, times=(0.3, 0.9))
        for i in (0, 1, 66):
            for n, t in enumerate((0.3, 0.9)):
                said, wanted = single(model, k, i, t)
                assert found[n, i] == pytest.approx(float((said - wanted).double().square().mean()), rel=1e-4)


def logits(model, i, t):
    ids, lengths = model.text_encoder.tokenize([CAPTIONS[i]])
    pooled = model.text_encoder.pool(model.text_encoder.encode(ids, lengths), lengths)
    state = (1 - t) * torch.from_numpy(LATENTS[i])[None] + t * noise(i)[None]
    with torch.no_grad():
        return model.router(state, torch.tensor([t]), pooled)[0].double()


def test_the_mixture_asks_whom_the_router_says(model):
    found = losses.flow_losses(losses.routed_velocity(model, LocalExperts(model), CAPTIONS, "top-2"), LATENTS, SEEDS, times=(0.6,))
    for i in (0, 5, 69):
        p, order = logits(model, i, 0.6).softmax(0), logits(model, i, 0.6).argsort(descending=True)[:2].tolist()
        total = sum(p[k] for k in order)
        said = [single(model, k, i, 0.6) for k in order]
        mixed = sum(p[k] / total * one for k, (one, _) in zip(order, said, strict=True))
        assert found[0, i] == pytest.approx(float((mixed - said[0][1]).double().square().mean()), rel=1e-4)
    with pytest.raises(ValueError, match="'caption' draws an expert for a whole picture"):
        losses.routed_velocity(model, LocalExperts(model), CAPTIONS, "caption")


def test_a_router_by_time_equals_a_loop(model):
    found = routers.router_by_time(model, model.router, LATENTS, CAPTIONS, CLUSTERS, SEEDS)
    assert len(found) == len(routers.TIMES)
    for t, one in list(zip(routers.TIMES, found, strict=True))[::3]:
        by_row = [logits(model, i, t).log_softmax(0) for i in range(N)]
        assert one.accuracy.hits == sum(int(row.argmax()) == CLUSTERS[i] for i, row in enumerate(by_row))
        assert one.log_loss == pytest.approx(-sum(float(row[CLUSTERS[i]]) for i, row in enumerate(by_row)) / N, rel=1e-4)
        assert one.accuracy.of == N


def test_a_classifier_is_judged_by_what_it_says():
    says = np.log(np.array([[0.8, 0.2], [0.8, 0.2], [0.8, 0.2], [0.8, 0.2], [0.3, 0.7]]))
    found = classifiers.judged(says, [0, 0, 0, 1, 1])
    assert found.accuracy.as_json()["hits"] == 4
    # Four say 80 % and three are right; one says 70 % and is: (4·0.05 + 0.3) / 5.
    assert found.calibration == pytest.approx((4 * 0.05 + 0.3) / 5)
    assert found.log_loss == pytest.approx(-(3 * math.log(0.8) + math.log(0.2) + math.log(0.7)) / 5)
    assert set(found.as_json()) == {"hits", "of", "share", "low", "high", "calibration", "log_loss"}


def test_the_prior_names_the_largest_cluster():
    trained, rows = [0] * 10 + [1] * 60 + [2] * 30, [1, 1, 0, 2, 1, 2]
    found = classifiers.prior(trained, rows, 3)
    assert (found.accuracy.hits, found.accuracy.of) == (3, 6)
    assert found.log_loss == pytest.approx(-(3 * math.log(0.6) + math.log(0.1) + 2 * math.log(0.3)) / 6)
    assert found.calibration == pytest.approx(0.1)
    assert classifiers.prior(trained, [3], 4).log_loss == pytest.approx(math.log(100.5 / 0.5))
