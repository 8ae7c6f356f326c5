"""What Serve is asked for. The cluster is pretended; tests/jobs/test_run_all.py and the demo use a real one."""

from __future__ import annotations

import io
import urllib.error

import pytest
from fabricated_cluster import publish, tiny

from jobs import serving
from jobs.local_cluster import ClusterError
from paris_ray import stages
from paris_ray.config import ConfigError, ServeConfig
from serve_app.app import Args


class FakeCluster:
    def __init__(self, details=None, error=None):
        self.details, self.error, self.put = details or {"applications": {}}, error, None

    def request(self, path, body=None, method="GET", timeout=10.0):
        if method == "PUT":
            if self.error:
                raise self.error
            self.put = body
            return None
        return self.details


def test_the_first_deployment_listens_where_it_is_told(tmp_path):
    cluster = FakeCluster()
    assert serving.deploy(cluster, tiny(tmp_path), 8123) == "http://127.0.0.1:8123"
    assert cluster.put["http_options"] == {"host": "127.0.0.1", "port": 8123}


def test_a_second_one_is_where_serve_listens_already(tmp_path):
    """Serve ignores another port with a warning; the URL would lead nowhere."""
    cluster = FakeCluster({"applications": {"paris": {"status": "RUNNING"}}, "http_options": {"host": "127.0.0.1", "port": 8000}})
    assert serving.deploy(cluster, tiny(tmp_path), 8123) == "http://127.0.0.1:8000"
    assert cluster.put["http_options"]["port"] == 8000


def test_the_application_takes_every_setting_of_a_config(tmp_path):
    settings = {"min_experts": 2, "max_masked_probability": 0.5, "images_per_minute": 30, "requests_at_once": 3, "max_queue": 7}
    config, cluster = tiny(tmp_path, *(f"serve.{name}={value}" for name, value in settings.items())), FakeCluster()
    serving.deploy(cluster, config, 8123)
    args = Args.model_validate(cluster.put["applications"][0]["args"])
    assert {name: getattr(args, name) for name in settings} == settings


@pytest.mark.parametrize("asked", [True, False])
def test_training_pictures_are_shown_only_where_the_config_says_so(tmp_path, asked):
    config, cluster = tiny(tmp_path, f"serve.contact_sheets={str(asked).lower()}"), FakeCluster()
    serving.deploy(cluster, config, 8123)
    args = Args.model_validate(cluster.put["applications"][0]["args"])
    assert args.clusters == (stages.folder(config, "partition").uri if asked else None)
    assert not ServeConfig().contact_sheets


@pytest.mark.parametrize(
    ("setting", "message"),
    [("min_experts=9", "serve.min_experts is 9, above the number of experts"), ("images_per_minute=1", "serve.images_per_minute is 1, below")],
)
def test_what_would_never_serve_is_refused(tmp_path, setting, message):
    with pytest.raises(ConfigError, match=message):
        tiny(tmp_path, f"serve.{setting}")


def test_a_model_made_anew_is_loaded_anew(tmp_path):
    config, cluster, seen = tiny(tmp_path), FakeCluster(), []
    for name in stages.names(config):
        publish(config, name)
    for content in ("made up", "made up", "other"):
        stages.folder(config, "assemble").delete_all()
        publish(config, "assemble", content)
        serving.deploy(cluster, config, 8000)
        seen.append(cluster.put["applications"][0]["args"]["revision"])
    assert seen[0] == seen[1] != seen[2]


def test_a_refusal_says_what_serve_said(tmp_path):
    error = urllib.error.HTTPError("http://x", 400, "Bad Request", {}, io.BytesIO(b"placement: nonsense"))
    with pytest.raises(ClusterError, match="placement: nonsense"):
        serving.deploy(FakeCluster(error=error), tiny(tmp_path), 8000)


def test_ready_is_the_new_model_and_not_the_old_one_that_still_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "answers", lambda url: True)
    monkeypatch.setattr(serving, "READY_SECONDS", 0.6)
    serving.wait_ready(FakeCluster({"applications": {"paris": {"status": "RUNNING"}}}), "http://x")
    with pytest.raises(ClusterError, match="DEPLOYING"):
        serving.wait_ready(FakeCluster({"applications": {"paris": {"status": "DEPLOYING"}}}), "http://x")


@pytest.mark.parametrize(("host", "key"), [("127.0.0.1", ""), ("localhost", ""), ("::1", ""), ("0.0.0.0", "k")])
def test_who_may_be_served(tmp_path, monkeypatch, host, key):
    monkeypatch.setenv("PARIS_API_KEYS", key)
    serving.check_exposed(tiny(tmp_path, f"serve.host='{host}'"))


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "my-machine"])
def test_other_machines_need_a_key(tmp_path, monkeypatch, host):
    monkeypatch.delenv("PARIS_API_KEYS", raising=False)
    with pytest.raises(ConfigError, match=r"serve.host: .* can be reached .*PARIS_API_KEYS_FILE"):
        serving.check_exposed(tiny(tmp_path, f"serve.host='{host}'"))
