"""The engine against a loop over one picture in plain Python, and what a service needs of it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
from concurrent.futures import CancelledError

import numpy as np
import pytest
import tiny_model
import torch

from paris_ray.diffusion.sampler import initial_noise
from paris_ray.inference.engine import Engine, EngineFull, EngineStopped, ImageRequest, TooDegraded, generate
from paris_ray.inference.experts import ExpertError, LocalExperts
from paris_ray.models import DiT, Router

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    return tiny_model.open_model(path, tiny_model.write_model(path))


@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    path = tmp_path_factory.mktemp("blind")
    return tiny_model.open_model(path, tiny_model.write_model(path, text=False))


# -- the reference: one picture, plain Python, float64, two passes for guidance, no batch ---------------------------------


def alpha_sigma(schedule, n):
    if schedule == "cosine":
        return math.cos(math.pi * n / 2), math.sin(math.pi * n / 2)
    log_alpha = -0.25 * n * n * 19.9 - 0.05 * n
    return math.exp(log_alpha), math.sqrt(1 - math.exp(2 * log_alpha))


def matched(schedule, t):
    """The time of the schedule with signal-to-noise ratio (1−t)/t, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(80):
        middle = (low + high) / 2
        a, s = alpha_sigma(schedule, middle)
        low, high = (middle, high) if a * t > s * (1 - t) else (low, middle)
    return (low + high) / 2


def expert_velocity(model, k, x, t, states):
    module, objective = model.load_expert(k)
    module = module.double()

    def run(x, t):
        return module(x[None], torch.tensor([t], dtype=torch.float64), states[None])[0]

    if objective.name == "flow":
        return run(x, t)
    n = matched(objective.schedule_name, t)
    state = x / math.sqrt((1 - t) ** 2 + t * t)
    noise = run(state, n)
    a, s = alpha_sigma(objective.schedule_name, n)
    x0 = ((state - s * noise) / max(a, 0.01)).clamp(-20, 20)
    return (x - x0) / t if t > 0.5 else (noise - x) / (1 - t)


def reference(model, request, available=None, choose=None):
    encoder = model.text_encoder

    def encode(prompt):
        ids, lengths = encoder.tokenize([prompt])
        states = encoder.encode(ids, lengths)
        return states[0].double(), encoder.pool(states, lengths)[0].double()

    (text, pooled), (null, _) = encode(request.prompt), encode(request.negative_prompt)
    experts = range(model.num_experts)
    available = available or [True] * model.num_experts
    router = tiny_model.load_router(model.folder / "router", tiny_model.SIZE).double()
    history = []

    def route(x, t):
        arguments = [x[None], torch.tensor([t], dtype=torch.float64)] + ([pooled[None]] if model.router_reads_text else [])
        logits = router(*arguments)[0].tolist()
        p = [math.exp(logit) if available[k] else 0.0 for k, logit in enumerate(logits)]
        p = [value / sum(p) for value in p]
        kind = request.routing
        if choose is not None:
            kept = [1.0 if k == choose else 0.0 for k in experts]
        elif kind.startswith("top-"):
            best = sorted(experts, key=lambda k: -p[k])[: int(kind[4:])]
            kept = [p[k] if k in best else 0.0 for k in experts]
        elif kind == "threshold":
            kept = [value if value >= 0.1 or value == max(p) else 0.0 for value in p]
        else:
            kept = p
        return [value / sum(kept) for value in kept]

    def weighed(x, t, chosen):
        """The router's probabilities, of the experts chosen."""
        arguments = [x[None], torch.tensor([t], dtype=torch.float64)] + ([pooled[None]] if model.router_reads_text else [])
        logits = router(*arguments)[0].tolist()
        p = [math.exp(logit) if chosen[k] else 0.0 for k, logit in enumerate(logits)]
        return [value / sum(p) for value in p]

    def velocity(x, t, weights):
        history.append(weights)
        total = torch.zeros_like(x)
        for k in experts:
            if weights[k]:
                v = expert_velocity(model, k, x, t, text)
                if request.guidance_interval[0] <= t <= request.guidance_interval[1]:
                    unconditional = expert_velocity(model, k, x, t, null)
                    v = unconditional + request.guidance_scale * (v - unconditional)
                total += weights[k] * v
        return total

    times = [1 - 0.999 * i / (request.steps - 1) for i in range(request.steps)] if request.steps > 1 else [1.0]
    if request.solver == "dpmpp_2m":
        times = [1 - i / request.steps for i in range(request.steps)]
    times.append(0.0)
    x = initial_noise(request.seed, request.index, model.latent_shape).double()
    looks = []  # (λ, x̂_0) of the steps so far
    for t, after in itertools.pairwise(times):
        weights = route(x, t)  # which experts: once a step
        v = velocity(x, t, weights)
        guess = x + (after - t) * v
        looks.append((math.log((1 - t) / t) if t < 1 else -math.inf, x - t * v))
        if request.solver == "midpoint":
            x = x + (after - t) * velocity((x + guess) / 2, (t + after) / 2, weighed((x + guess) / 2, (t + after) / 2, weights))
        elif request.solver == "heun" and after != 0:
            x = x + (after - t) * (v + velocity(guess, after, weighed(guess, after, weights))) / 2
        elif request.solver == "dpmpp_2m" and after != 0 and len(looks) > 1:
            # As the paper has it, with α = 1 − t and σ = t: arXiv 2211.01095, algorithm 2.
            (earlier, x0_before), (now, x0) = looks[-2:]
            h = math.log((1 - after) / after) - now
            r = (now - earlier) / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before
            x = after / t * x - (1 - after) * ((math.exp(-h) if now > -math.inf else 0.0) - 1) * d
        else:
            x = guess
    return x.numpy(), history


def ask(**changes):
    return ImageRequest(**{"prompt": "red fox", "seed": 3, "steps": 4, "guidance_scale": 3.0, "routing": "top-2", "solver": "euler", **changes})


def close(result, expected):
    latent, history = expected
    np.testing.assert_allclose([entry["weights"] for entry in result.routing], history, atol=2e-4)
    np.testing.assert_allclose(result.latent, latent, atol=5e-3 * np.abs(latent).max())
    assert np.median(np.abs(result.latent - latent)) < 2e-4 * np.abs(latent).max()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"routing": "top-1", "seed": 4},
        {"routing": "full", "guidance_scale": 1.0},
        {"routing": "threshold", "solver": "heun", "steps": 3},
        {"solver": "midpoint", "steps": 3},
        {"solver": "dpmpp_2m", "steps": 6},
        {"guidance_interval": (0.2, 0.8), "steps": 5, "guidance_scale": 7.5},
        {"guidance_interval": (0.0, 0.5), "solver": "heun", "routing": "full"},
        {"negative_prompt": "blue ground", "routing": "top-3", "index": 2},
        {"prompt": "", "steps": 1, "routing": "full"},
    ],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()) or "default",
)
def test_picture_is_that_of_the_plain_loop(model, changes):
    request = ask(**changes)
    (result,) = generate(model, [request])
    close(result, reference(model, request))
    assert result.degraded == []
    assert result.image.shape == (16, 16, 3)
    assert result.image.dtype == np.uint8
    assert np.array_equal(result.image, tiny_model.Codec().decode(torch.tensor(result.latent)[None])[0])


def test_text_blind_router(blind):
    request = ask(routing="full")
    close(generate(blind, [request])[0], reference(blind, request))


@pytest.mark.parametrize("k", range(4))
def test_expert_routing_flow_and_ddpm(model, k):
    request = ask(routing=f"expert-{k}", steps=5)
    close(generate(model, [request])[0], reference(model, request, choose=k))


def test_caption_routing_draws_from_the_router_at_noise(model):
    requests = [ask(routing="caption", steps=1, guidance_scale=1.0, index=i) for i in range(300)]
    results = generate(model, requests)
    chosen = [int(np.argmax(r.routing[0]["weights"])) for r in results]
    assert all(sorted(r.routing[0]["weights"]) == [0, 0, 0, 1] for r in results)
    # Frequencies against the mean of p(k | noise, caption) over the same noises: five standard deviations of a binomial.
    full = generate(model, [dataclasses.replace(r, routing="full") for r in requests])
    p = np.mean([r.routing[0]["weights"] for r in full], axis=0)
    assert np.all(np.abs(np.bincount(chosen, minlength=4) / 300 - p) < 5 * np.sqrt(p * (1 - p) / 300))
    # One expert for the whole trajectory, the same one each time it is asked.
    long = ask(routing="caption", steps=4, index=7)
    first, again = generate(model, [long])[0], generate(model, [long])[0]
    assert len({int(np.argmax(e["weights"])) for e in first.routing}) == 1
    assert np.array_equal(first.image, again.image)
    close(first, reference(model, long, choose=int(np.argmax(first.routing[0]["weights"]))))


# -- batching never changes a picture -----------------------------------------------------------------------------------


def crowd(n):
    solvers, routings = ["euler", "heun", "midpoint", "dpmpp_2m"], ["top-2", "full", "caption", "threshold", "top-1", "expert-1"]
    return [
        ask(prompt=f"thing {i % 7}", seed=100 + i, steps=2 + i % 5, guidance_scale=[1.0, 3.0, 7.5][i % 3], solver=solvers[i % 4],
            routing=routings[i % 6], negative_prompt="" if i % 4 else "bad", client=f"c{i % 3}",
            guidance_interval=(0.3, 0.7) if i % 5 == 0 else (0.0, 1.0))
        for i in range(n)
    ]  # fmt: skip


def test_bytes_do_not_depend_on_company(model):
    requests = [ask(steps=6), ask(steps=5, solver="heun", guidance_scale=1.0, prompt="green leaf"), ask(routing="full", negative_prompt="bad")]
    alone = [generate(model, [request])[0] for request in requests]
    for max_rows in (1, 2, 5, 16, 64):
        engine = Engine(model, LocalExperts(model), max_rows=max_rows)
        others = [engine.submit(request) for request in crowd(10)]
        for _ in range(2):
            engine.tick()  # the others are at other steps
        futures = [engine.submit(request) for request in requests]
        others += [engine.submit(request) for request in crowd(30)[10:]]
        engine.run_until_idle()
        for future, expected in zip(futures, alone, strict=True):
            assert future.result().latent.tobytes() == expected.latent.tobytes()
            assert future.result().image.tobytes() == expected.image.tobytes()
            assert future.result().routing == expected.routing
        assert all(future.done() for future in others)


def test_every_batch_size_gives_the_same_bytes(model):
    requests = [dataclasses.replace(r, steps=2, solver="euler") for r in crowd(40)]
    alone = [generate(model, [request])[0].latent.tobytes() for request in requests]
    for n in range(1, 41):
        engine = Engine(model, LocalExperts(model), max_rows=n)
        futures = [engine.submit(request) for request in requests[-n:]]
        engine.run_until_idle()
        assert [f.result().latent.tobytes() for f in futures] == alone[-n:], n


def test_a_picture_runs_no_more_rows_than_it_has(model, monkeypatch):
    """Guided, two through an expert and one through the router; without guidance one and one."""
    rows = {DiT: [], Router: []}
    for network in (DiT, Router):

        def counting(self, x, *arguments, network=network, forward=network.forward, **keywords):
            rows[network].append(len(x))
            return forward(self, x, *arguments, **keywords)

        monkeypatch.setattr(network, "forward", counting)
    generate(model, [ask(routing="top-1", steps=3)])
    assert rows == {DiT: [2] * 3, Router: [1] * 3}
    generate(model, [ask(routing="top-2", steps=2, guidance_scale=1.0)])
    assert rows == {DiT: [2] * 3 + [1] * 4, Router: [1] * 5}


def test_threads_stay_as_they_are_unless_told(model):
    try:
        torch.set_num_threads(2)
        generate(model, [ask(steps=1)])
        Engine(model, LocalExperts(model, indices=[0]))
        assert torch.get_num_threads() == 2
        LocalExperts(model, indices=[0], threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


# -- routing once a step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 5), ("heun", 9), ("midpoint", 10)])
def test_experts_are_chosen_once_a_step_and_weighed_at_every_velocity(model, monkeypatch, solver, evaluations):
    asked, forward = [], Router.forward

    def counting(self, x, t, *arguments):
        asked.append(t.tolist())
        return forward(self, x, t, *arguments)

    monkeypatch.setattr(Router, "forward", counting)
    steps = np.append(np.linspace(1, 0.001, 5), 0)[:-1]
    (alone,) = generate(model, [ask(solver=solver, steps=5, routing="top-1")])
    np.testing.assert_allclose(asked, steps[:, None], rtol=1e-6)  # of one expert there is nothing to weigh
    assert len(alone.routing) == evaluations
    asked.clear()
    (result,) = generate(model, [ask(solver=solver, steps=5, routing="top-2")])
    assert len(asked) == evaluations
    weights = np.array([entry["weights"] for entry in result.routing])
    if evaluations > 5:
        first, second = weights[0 : evaluations - 1 : 2], weights[1:evaluations:2]
        assert ((first != 0) == (second != 0)).all()
        assert (first != second).any(1).all()


def test_a_step_whose_expert_goes_in_the_middle_is_routed_anew(model):
    experts = LocalExperts(model)
    engine = Engine(model, experts)
    futures = [engine.submit(ask(solver="heun", steps=3, routing="full")), engine.submit(ask(solver="heun", steps=3, routing="expert-0"))]
    engine.tick()
    experts.unload(1)
    engine.run_until_idle()
    lost = [entry["weights"][1] for entry in futures[0].result().routing]
    assert lost[0] > 0
    assert lost[1:] == [0.0] * 4
    assert futures[0].result().degraded == [1]
    assert futures[1].result().degraded == []


class Recorder:
    """Experts that note what they are asked, and can be told to fail."""

    def __init__(self, inner):
        self.inner, self.num_experts = inner, inner.num_experts
        self.calls, self.fail = [], {}

    versions = property(lambda self: self.inner.versions)

    def available(self):
        return self.inner.available()

    def velocities(self, calls):
        self.calls.append([(call.expert, len(call.cond)) for call in calls])
        for call in calls:
            if call.expert in self.fail:
                raise self.fail[call.expert]()
        return self.inner.velocities(calls)


def test_each_expert_is_called_at_most_once_a_tick(model):
    recorder = Recorder(LocalExperts(model))
    engine = Engine(model, recorder, max_rows=32)
    futures = [engine.submit(request) for request in crowd(30)]
    engine.run_until_idle()
    assert all(len({k for k, _ in tick}) == len(tick) for tick in recorder.calls)
    assert len(recorder.calls) == max(len(f.result().routing) for f in futures)
    metrics = engine.metrics
    assert metrics["evaluations"] == sum(len(f.result().routing) for f in futures)
    assert metrics["rows_per_expert"] == [sum(n for tick in recorder.calls for j, n in tick if j == k) for k in range(4)]
    assert (metrics["finished"], metrics["active"], metrics["queued"], metrics["failed"]) == (30, 0, 0, 0)


def test_a_guidance_interval_halves_the_passes_outside_of_it(model, monkeypatch):
    """Rows that the networks themselves see of eight pictures: sixteen inside of the interval, eight outside."""
    rows, forward = [], DiT.forward

    def counting(self, x, *arguments, **keywords):
        rows.append(len(x))
        return forward(self, x, *arguments, **keywords)

    monkeypatch.setattr(DiT, "forward", counting)
    times = np.append(np.linspace(1, 0.001, 8), 0)[:-1]
    for interval, inside in (((0.0, 1.0), 8), ((0.25, 0.75), int(((times >= 0.25) & (times <= 0.75)).sum())), ((0.9, 0.95), 0)):
        rows.clear()
        generate(model, [ask(routing="expert-0", steps=8, guidance_interval=interval, index=i) for i in range(8)])
        assert sorted(rows) == [8] * (8 - inside) + [16] * inside


def test_nobody_waits_for_anothers_end(model):
    engine = Engine(model, LocalExperts(model), max_rows=2)
    slow, quick, later = engine.submit(ask(steps=50)), engine.submit(ask(steps=2)), engine.submit(ask(steps=2))
    for _ in range(4):
        engine.tick()
    assert quick.done()
    assert later.done()
    assert not slow.done()


def test_clients_take_turns(model):
    engine = Engine(model, LocalExperts(model), max_rows=1)
    order = []
    for client, count in (("greedy", 4), ("modest", 1)):
        for i in range(count):
            future = engine.submit(ask(steps=1, client=client, index=i))
            future.add_done_callback(lambda _, name=f"{client}{i}": order.append(name))
    engine.run_until_idle()
    assert order == ["greedy0", "modest0", "greedy1", "greedy2", "greedy3"]


def test_prompts_and_text_projections_are_computed_once(model):
    experts = LocalExperts(model)
    engine = Engine(model, experts)
    tiny_model.Text.calls = 0
    for i in range(6):
        engine.submit(ask(routing="full", index=i, steps=5))
    engine.run_until_idle()
    assert tiny_model.Text.calls == 1
    assert experts.cache_stats["misses"] == 2 * model.num_experts  # the prompt and the empty one


def test_a_prompt_that_is_cut_is_named_once(model, caplog):
    engine = Engine(model, LocalExperts(model))
    for i in range(2):
        for words in (4, 5):  # with the start token five and six; the encoder reads five
            engine.submit(ask(prompt=" ".join(["w"] * words), index=i, steps=1))
    engine.run_until_idle()
    assert [record.getMessage() for record in caplog.records] == ["prompt 'w w w w w' has 6 tokens; the model reads the first 5"]


def test_small_text_cache_changes_no_byte(model):
    small = Engine(model, LocalExperts(model, cache_bytes=1))
    futures = [small.submit(request) for request in crowd(6)]
    small.run_until_idle()
    assert [f.result().latent.tobytes() for f in futures] == [r.latent.tobytes() for r in generate(model, crowd(6))]


# -- what goes wrong ----------------------------------------------------------------------------------------------------


def test_masked_expert_is_reported_and_the_rest_renormalised(model):
    experts = LocalExperts(model, indices=[0, 2, 3])
    for request in (ask(routing="full"), ask(routing="top-2", seed=9)):
        engine = Engine(model, experts)
        future = engine.submit(request)
        engine.run_until_idle()
        assert future.result().degraded == [1]
        close(future.result(), reference(model, request, available=[True, False, True, True]))


def test_what_the_missing_would_have_said_is_reported_and_limited(model):
    """With one step, the plain loop over all experts says what the router gives the one that is missing."""
    request = ask(routing="full", steps=1)
    lost = reference(model, request)[1][0][1]
    assert 0.01 < lost < 0.99

    def draw(limit):
        engine = Engine(model, LocalExperts(model, indices=[0, 2, 3]), max_masked=limit)
        futures = [engine.submit(request), engine.submit(ask(routing="expert-0"))]
        engine.run_until_idle()
        assert futures[1].result().masked_probability == 0.0
        return futures[0]

    assert draw(1.0).result().masked_probability == pytest.approx(lost, abs=1e-4)
    assert draw(lost + 1e-3).result().degraded == [1]
    with pytest.raises(TooDegraded, match=r"experts 1 are not available, and the router gives them .*% of this picture at t = 1, above"):
        draw(lost - 1e-3).result()
    assert generate(model, [request])[0].masked_probability == 0.0


def test_unavailable_expert_is_named_and_only_its_row_fails(model):
    engine = Engine(model, LocalExperts(model, indices=[0, 3]))
    bad, good = engine.submit(ask(routing="expert-2")), engine.submit(ask(routing="expert-3"))
    engine.run_until_idle()
    with pytest.raises(ExpertError, match=r"expert 2: is not available.*available: 0, 3"):
        bad.result()
    assert good.result().degraded == []


def test_no_expert_at_all(model):
    engine = Engine(model, LocalExperts(model, indices=[]))
    future = engine.submit(ask())
    engine.run_until_idle()
    with pytest.raises(RuntimeError, match="no expert is available"):
        future.result()


def test_expert_lost_on_the_way_is_masked_from_then_on(model):
    inner = LocalExperts(model)
    recorder = Recorder(inner)
    engine = Engine(model, recorder)
    row, other, pinned = engine.submit(ask(routing="full")), engine.submit(ask(routing="expert-0")), engine.submit(ask(routing="expert-1"))
    engine.tick()

    def die():
        inner.unload(1)
        return ExpertError(1, "its machine has gone")

    recorder.fail[1] = die
    engine.tick()
    engine.run_until_idle()
    assert row.result().degraded == [1]
    assert len(row.result().routing) == 4
    assert row.result().routing[0]["weights"][1] > 0
    assert all(entry["weights"][1] == 0 for entry in row.result().routing[1:])
    assert other.result().latent.tobytes() == generate(model, [ask(routing="expert-0")])[0].latent.tobytes()
    with pytest.raises(ExpertError, match="expert 1"):
        pinned.result()


def test_caption_row_redraws_when_its_expert_goes(model):
    experts = LocalExperts(model)
    engine = Engine(model, experts)
    future = engine.submit(ask(routing="caption", steps=3))
    engine.tick()
    first = int(np.argmax(generate(model, [ask(routing="caption", steps=1)])[0].routing[0]["weights"]))
    experts.unload(first)
    engine.run_until_idle()
    assert future.result().degraded == [first]
    assert [entry["weights"][first] for entry in future.result().routing] == [1, 0, 0]


def test_error_in_an_expert_fails_its_rows_and_the_engine_goes_on(model):
    recorder = Recorder(LocalExperts(model))
    engine = Engine(model, recorder)
    recorder.fail[1] = lambda: ExpertError(1, "out of memory")
    bad, good = engine.submit(ask(routing="expert-1")), engine.submit(ask(routing="expert-2"))
    engine.run_until_idle()
    with pytest.raises(ExpertError, match="expert 1: out of memory"):
        bad.result()
    assert good.result().latent.tobytes() == generate(model, [ask(routing="expert-2")])[0].latent.tobytes()
    recorder.fail = {1: lambda: KeyError("no idea")}
    lost = engine.submit(ask(routing="expert-1"))
    engine.run_until_idle()
    with pytest.raises(KeyError):
        lost.result()
    recorder.fail = {}
    again = engine.submit(ask())
    engine.run_until_idle()
    assert again.result().image.shape == (16, 16, 3)


def test_values_that_are_not_finite_fail_one_row(model):
    class Wild(LocalExperts):
        def velocities(self, calls):
            return [v * torch.inf if call.expert == 1 else v for call, v in zip(calls, super().velocities(calls), strict=True)]

    engine = Engine(model, Wild(model))
    bad, good = engine.submit(ask(routing="expert-1")), engine.submit(ask(routing="expert-0"))
    engine.run_until_idle()
    with pytest.raises(ArithmeticError, match="not finite"):
        bad.result()
    assert good.result()


def test_error_in_a_prompt_fails_its_row_only(model, monkeypatch):
    engine = Engine(model, LocalExperts(model))
    tokenize = model.text_encoder.tokenize

    def broken(captions):
        if captions == ["poison"]:
            raise ValueError("cannot read poison")
        return tokenize(captions)

    monkeypatch.setattr(model.text_encoder, "tokenize", broken)
    bad, good = engine.submit(ask(prompt="poison")), engine.submit(ask())
    engine.run_until_idle()
    with pytest.raises(ValueError, match="cannot read poison"):
        bad.result()
    assert good.result()


def test_error_in_decoding_does_not_stop_the_engine(model, monkeypatch):
    engine = Engine(model, LocalExperts(model))
    with monkeypatch.context() as patch:
        patch.setattr(model.codec, "decode", lambda latents: 1 / 0)
        bad = engine.submit(ask())
        engine.run_until_idle()
    with pytest.raises(ZeroDivisionError):
        bad.result()
    good = engine.submit(ask())
    engine.run_until_idle()
    assert good.result()


def test_cancel_frees_the_row(model):
    engine = Engine(model, LocalExperts(model), max_rows=1)
    first, second, third = (engine.submit(ask(steps=40, index=i)) for i in range(3))
    engine.tick()
    assert first.cancel()
    assert third.cancel()
    engine.tick()
    assert engine.metrics["active"] == 1
    assert engine.metrics["queued"] == 0
    assert engine.metrics["cancelled"] == 2
    engine.run_until_idle()
    with pytest.raises(CancelledError):
        first.result()
    assert len(second.result().routing) == 40


def test_queue_full(model):
    engine = Engine(model, LocalExperts(model), max_rows=1, max_queue=2)
    futures = [engine.submit(ask(index=i)) for i in range(2)]
    with pytest.raises(EngineFull, match="2 pictures wait already"):
        engine.submit(ask())
    futures[0].cancel()
    futures.append(engine.submit(ask(index=2)))  # the cancelled one no longer counts
    engine.run_until_idle()
    assert engine.metrics["rejected"] == 1
    assert engine.metrics["finished"] == 2


def test_previews(model):
    engine = Engine(model, LocalExperts(model))
    seen = []
    future = engine.submit(ask(steps=7, routing="full"), preview=seen.append, preview_every=2)
    engine.run_until_idle()
    assert [(p.evaluation, p.evaluations) for p in seen] == [(2, 7), (4, 7), (6, 7)]
    assert all(p.image.shape == (16, 16, 3) for p in seen)
    assert [round(p.t, 4) for p in seen] == [round(future.result().routing[i]["t"], 4) for i in (1, 3, 5)]
    assert future.result().latent.tobytes() == generate(model, [ask(steps=7, routing="full")])[0].latent.tobytes()

    def broken(preview):
        raise OSError("client has gone")

    bad, good = engine.submit(ask(), preview=broken, preview_every=1), engine.submit(ask())
    engine.run_until_idle()
    with pytest.raises(OSError, match="client has gone"):
        bad.result()
    assert good.result()


def test_preview_is_the_state_minus_t_times_velocity(model):
    seen = []
    engine = Engine(model, LocalExperts(model))
    request = ask(routing="expert-0", steps=2, guidance_scale=1.0)
    engine.submit(request, preview=seen.append, preview_every=1)
    engine.run_until_idle()
    (preview,) = seen
    noise = initial_noise(request.seed, request.index, model.latent_shape).double()
    ids, lengths = model.text_encoder.tokenize([request.prompt])
    v = expert_velocity(model, 0, noise, 1.0, model.text_encoder.encode(ids, lengths)[0].double())
    expected = tiny_model.Codec().decode((noise - v)[None].float())[0].astype(int)
    assert np.abs(expected - preview.image).max() <= 1


def test_thread_serves_many_callers_and_stops(model):
    engine = Engine(model, LocalExperts(model), max_rows=8)
    engine.start()
    results = {}

    def caller(i):
        results[i] = engine.submit(crowd(12)[i]).result(timeout=60)

    threads = [threading.Thread(target=caller, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = generate(model, crowd(12))
    assert all(results[i].latent.tobytes() == expected[i].latent.tobytes() for i in range(12))
    assert generate(engine, [ask()])[0].latent.tobytes() == generate(model, [ask()])[0].latent.tobytes()
    pending = engine.submit(ask(steps=1000))
    engine.stop()
    with pytest.raises(EngineStopped):
        pending.result(timeout=5)
    with pytest.raises(EngineStopped):
        engine.submit(ask())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_died(model, monkeypatch):
    engine = Engine(model, LocalExperts(model))

    def broken():
        raise MemoryError("no more")

    monkeypatch.setattr(engine, "tick", broken)
    engine.start()
    future = engine.submit(ask())
    with pytest.raises(EngineStopped, match="MemoryError: no more"):
        future.result(timeout=10)
    engine._thread.join(timeout=10)
    assert not engine.running
    with pytest.raises(EngineStopped):
        engine.submit(ask())
    engine.stop()


def test_bf16_is_near_and_keeps_ddpm_experts_in_fp32(model):
    half = dataclasses.replace(model, precision="bf16")
    dtypes = [half.load_expert(k)[0].patch_embed.weight.dtype for k in range(4)]
    assert dtypes == [torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16]
    requests = [ask(routing="expert-0", guidance_scale=1.0), ask(routing="expert-1", guidance_scale=1.0)]
    for near, exact in zip(generate(half, requests), generate(model, requests), strict=True):
        np.testing.assert_allclose(near.latent, exact.latent, atol=0.05 * np.abs(exact.latent).max())
    for a, b in zip(crowd(12), generate(half, crowd(12)), strict=True):
        assert generate(half, [a])[0].latent.tobytes() == b.latent.tobytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"steps: 0 must be a whole number from 1 to 1000"),
        ({"steps": 2.5}, r"steps: 2.5 must be"),
        ({"guidance_scale": 0.5}, r"guidance_scale: 0.5 must be a number from 1"),
        ({"guidance_scale": float("nan")}, r"guidance_scale: nan"),
        ({"guidance_interval": (0.8, 0.2)}, r"guidance_interval: \(0.8, 0.2\) must be two times, low and high, with 0 ≤ low < high ≤ 1"),
        ({"guidance_interval": (0.2, 1.5)}, r"guidance_interval: \(0.2, 1.5\) must be"),
        ({"guidance_interval": (float("nan"), 1.0)}, r"guidance_interval: \(nan, 1.0\) must be"),
        ({"guidance_interval": (0.2, True)}, r"guidance_interval: \(0.2, True\) must be"),
        ({"guidance_interval": (0.2,)}, r"guidance_interval: \(0.2,\) must be"),
        ({"guidance_interval": None}, r"guidance_interval: None must be"),
        ({"solver": "rk4"}, r"solver: 'rk4' is not one of euler, heun"),
        ({"routing": "top-9"}, r"routing: 'top-9' is not one of top-1 … top-4"),
        ({"seed": -1}, r"seed: -1 must be"),
        ({"prompt": None}, r"prompt: None must be text"),
    ],
)
def test_bad_requests_are_named(model, changes, message):
    engine = Engine(model, LocalExperts(model, indices=[]))
    with pytest.raises(ValueError, match=message):
        engine.submit(ask(**changes))
    assert engine.metrics["queued"] == 0


def test_caption_routing_needs_a_router_that_reads(blind):
    with pytest.raises(ValueError, match="needs a router that reads text"):
        generate(blind, [ask(routing="caption")])


def test_defaults_come_from_the_model(model):
    request = Engine(model, LocalExperts(model, indices=[])).validate(ImageRequest("x"))
    assert (request.steps, request.guidance_scale, request.routing, request.solver) == (4, 3.0, "top-2", "euler")
