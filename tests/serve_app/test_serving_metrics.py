"""What is measured, against counts by hand; the dashboard against the names."""

import json
import re
import threading
from collections import defaultdict
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from serve_app import metrics
from serve_app.api import create_app
from serve_app.deployments import Sampler
from serve_app.keys import key_digests
from serve_app.limits import Limits
from serve_app.protocol import ApiError
from serve_app.work import Queued

PATH = "/v1/images/generations"
DASHBOARD = json.loads((Path(metrics.__file__).parent / "static" / "grafana.json").read_text())


class Recorder:
    """Keeps every value by metric and tags."""

    def __init__(self):
        self.lock, self.seen = threading.Lock(), defaultdict(list)

    def __call__(self, metric, value, **tags):
        assert metric in metrics.ALL
        assert tuple(tags) == metric.tags
        with self.lock:
            self.seen[metric, tuple(tags.values())].append(value)

    def sum(self, metric, *tags):
        return sum(self.seen[metric, tags])

    def last(self, metric, *tags):
        return self.seen[metric, tags][-1]


@pytest.fixture(scope="module")
def measured(model_path):
    recorder = Recorder()
    sampler = Sampler(str(model_path), max_rows=4, max_queue=4, report=recorder)
    yield sampler, recorder
    sampler.close()


def fresh(recorder):
    with recorder.lock:
        recorder.seen.clear()


def test_the_sampler_counts_pictures_steps_rows_and_shares(measured):
    sampler, recorder = measured
    client = TestClient(create_app(sampler, report=recorder))
    fresh(recorder)
    full = client.post(PATH, json={"prompt": "x", "n": 3, "num_inference_steps": 4, "routing": "full"}).json()
    assert client.post(PATH, json={"prompt": "x", "n": 2, "num_inference_steps": 5, "routing": "expert-2"}).status_code == 200
    assert client.post(PATH, json={"prompt": "x", "n": 10, "num_inference_steps": 100}).status_code == 429  # whole or not at all
    assert client.post(PATH, json={"prompt": "x", "num_inference_steps": 1, "routing": "expert-2"}).status_code == 200
    sampler.check_health()
    with sampler.engine.driving:
        pass  # the tick that finished the last picture has reported

    assert recorder.sum(metrics.PICTURES, "finished") == 6
    assert recorder.sum(metrics.PICTURES, "failed") == 0
    assert recorder.sum(metrics.PICTURES, "rejected") == 1
    assert recorder.sum(metrics.PICTURES, "cancelled") == 0
    assert recorder.sum(metrics.ADMITTED) == 6
    assert recorder.sum(metrics.STEP_ROWS) >= 3 * 4 + 2 * 5 + 1
    assert len(recorder.seen[metrics.STEP_ROWS, ()]) == len(recorder.seen[metrics.STEP_SECONDS, ()])
    assert len(recorder.seen[metrics.PICTURE_SECONDS, ()]) == 6
    assert recorder.seen[metrics.MASKED, ()] == [0.0] * 6
    assert recorder.sum(metrics.EXPERT_ROWS, "0") >= 3 * 4
    assert min(recorder.seen[metrics.EXPERT_ROWS, ("2",)]) >= 1
    shares = [sum(sum(step["weights"][k] for step in item["routing"]) / 4 for item in full["data"]) for k in range(3)]
    for k, share in enumerate(shares):
        assert recorder.sum(metrics.ROUTED, str(k)) == pytest.approx(share + (3 if k == 2 else 0), abs=1e-3)
        assert recorder.last(metrics.READY, str(k)) == 1.0
    assert 0 < recorder.sum(metrics.DECODE_SECONDS) < recorder.sum(metrics.STEP_SECONDS)
    assert (recorder.last(metrics.QUEUED), recorder.last(metrics.ACTIVE)) == (0, 0)


def test_answers_by_status_and_reason(measured):
    sampler, recorder = measured
    fresh(recorder)
    limits = Limits(images_per_minute=4, max_images_per_request=2)
    client = TestClient(create_app(sampler, limits, key_digests("first-key"), report=recorder))

    def ask(key="first-key", **fields):
        return client.post(PATH, json={"prompt": "x", "num_inference_steps": 1, **fields}, headers={"authorization": f"Bearer {key}"}).status_code

    client.get("/v1/models")
    client.get("/nothing")
    assert [ask("wrong"), ask(routing="no"), ask(model="no"), ask(n=2), ask(n=2, stream=True), ask()] == [401, 400, 404, 200, 200, 429]
    found = {tags: len(values) for (metric, tags), values in recorder.seen.items() if metric is metrics.ANSWERS}
    assert found == {
        ("401", "invalid_api_key"): 1,
        ("400", "invalid_value"): 1,
        ("404", "model_not_found"): 1,
        ("200", "ok"): 2,
        ("429", "rate_limit_exceeded"): 1,
    }


def test_failures_are_counted_too(measured):
    sampler, recorder = measured

    class Broken:
        card = staticmethod(sampler.card)

        async def generate(self, job):
            raise KeyError

        async def stream(self, job):
            yield Queued()
            raise KeyError if job.prompt == "x" else ApiError(503, "gone", code="stopping")

    fresh(recorder)
    client = TestClient(create_app(Broken(), report=recorder))
    client.post(PATH, json={"prompt": "x"})
    client.post(PATH, json={"prompt": "x"}, headers={"x-long": "x" * 20_000})
    client.post(PATH, json={"prompt": "x", "stream": True})
    client.post(PATH, json={"prompt": "y", "stream": True})
    assert recorder.sum(metrics.ANSWERS, "500", "internal_error") == 1
    assert recorder.sum(metrics.ANSWERS, "431", "headers_too_large") == 1
    assert recorder.sum(metrics.BROKEN_STREAMS, "internal_error") == 1
    assert recorder.sum(metrics.BROKEN_STREAMS, "stopping") == 1


# -- the dashboard ------------------------------------------------------------------------------------------------------


def exported():
    """Names as Prometheus sees them, and each one's labels."""
    found = {}
    for metric in metrics.ALL:
        for suffix in ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",):
            found[f"ray_{metric.name}{suffix}"] = {*metric.tags, *(("le",) if suffix == "_bucket" else ())}
    return found


def expressions():
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_the_dashboard_asks_for_metrics_that_exist_by_labels_that_they_have():
    known = exported()
    for expression in expressions():
        names = set(re.findall(r"\bray_\w+", expression))
        assert names
        assert names <= set(known)
        for labels in re.findall(r"by \(([^)]*)\)", expression):
            for name in names:
                assert set(labels.split(", ")) <= known[name], expression
        assert expression.count("(") == expression.count(")")


def test_the_dashboard_shows_every_metric():
    everything = " ".join(expressions())
    for metric in metrics.ALL:
        assert re.search(rf"\bray_{metric.name}(_bucket|_sum|_count)?\b", everything), metric.name


def test_the_dashboards_panels_have_titles_and_places_of_their_own():
    panels = DASHBOARD["panels"]
    assert len({panel["title"] for panel in panels}) == len({panel["id"] for panel in panels}) == len(panels)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)


def test_names_are_prometheus_names_of_their_kind():
    assert len({metric.name for metric in metrics.ALL}) == len(metrics.ALL)
    for metric in metrics.ALL:
        assert re.fullmatch(r"paris_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert bool(metric.boundaries) == (metric.kind == "histogram")
        metrics.to_ray(metric, 1.0, **dict.fromkeys(metric.tags, "x"))  # Ray takes it, with and without a cluster
