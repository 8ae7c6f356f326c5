"""Notices of an interruption, from a server that answers as the clouds' documents say."""

from __future__ import annotations

import datetime
import email.utils
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from paris_ray.training import preemption
from paris_ray.training.preemption import Watcher


@pytest.fixture
def metadata(monkeypatch):
    """A metadata service: ``answers`` by (method, path), each a function of the headers that gives status and body."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            status, body = server.answers.get((self.command, self.path), lambda headers: (404, ""))(self.headers)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_PUT = answer

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answers = {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.host = f"127.0.0.1:{server.server_port}"
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # not to be asked
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{server.host}/")
    monkeypatch.setenv("GCE_METADATA_HOST", server.host)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def in_seconds(seconds: float) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)


def test_aws(metadata):
    token = {("PUT", "/latest/api/token"): lambda h: (200, "secret") if h["X-aws-ec2-metadata-token-ttl-seconds"] == "60" else (400, "")}
    metadata.answers = dict(token)
    assert preemption.aws() is None
    when = in_seconds(110).strftime("%Y-%m-%dT%H:%M:%SZ")
    body = json.dumps({"action": "terminate", "time": when})
    path = ("GET", "/latest/meta-data/spot/instance-action")
    metadata.answers[path] = lambda h: (200, body) if h["X-aws-ec2-metadata-token"] == "secret" else (401, "")
    notice = preemption.aws()
    assert notice.text == f"AWS will terminate this instance at {when}"
    assert 105 < notice.seconds <= 110
    metadata.answers = {path: metadata.answers[path]}  # without a token it is 401, which is no "nothing there"
    with pytest.raises(OSError, match="401"):
        preemption.aws()


def test_gcp(metadata):
    here = "/computeMetadata/v1/instance"

    def says(text):
        return lambda h: (200, text) if h["Metadata-Flavor"] == "Google" else (403, "")

    metadata.answers = {("GET", f"{here}/preempted"): says("FALSE"), ("GET", f"{here}/maintenance-event"): says("NONE")}
    assert preemption.gcp() is None
    metadata.answers[("GET", f"{here}/maintenance-event")] = says("TERMINATE_ON_HOST_MAINTENANCE")
    assert preemption.gcp().seconds == 3600
    metadata.answers[("GET", f"{here}/preempted")] = says("TRUE\n")
    assert preemption.gcp() == preemption.Notice("Google Cloud preempts this instance", 30.0)


@pytest.mark.parametrize(("kind", "begun", "seconds"), [("Preempt", False, 25), ("Terminate", True, 0), ("Freeze", False, None)])
def test_azure(metadata, kind, begun, seconds):
    when = "" if begun else email.utils.format_datetime(in_seconds(25), usegmt=True)
    event = {"EventId": "A", "EventType": kind, "ResourceType": "VirtualMachine", "Resources": ["vm"], "EventStatus": "Scheduled", "NotBefore": when}
    body = json.dumps({"DocumentIncarnation": 1, "Events": [event]})
    path = ("GET", "/metadata/scheduledevents?api-version=2020-07-01")
    metadata.answers = {path: lambda h: (200, body) if h["Metadata"] == "true" else (400, "")}
    notice = preemption.azure(f"http://{metadata.host}")
    if seconds is None:
        assert notice is None
    else:
        assert kind in notice.text
        assert seconds - 5 < notice.seconds <= seconds or notice.seconds == seconds == 0


def test_the_watcher_tells_once_and_outlives_a_service_that_fails(metadata, capsys):
    here, told, heard = "/computeMetadata/v1/instance/preempted", [], threading.Event()
    answers = [(500, "down"), (200, "FALSE"), (503, "down"), (503, "down"), (200, "TRUE")]
    metadata.answers = {("GET", here): lambda h: answers.pop(0) if len(answers) > 1 else answers[0]}

    def on_notice(notice):
        told.append(notice.text)
        heard.set()

    with Watcher("gcp", on_notice, every=0.01):
        assert heard.wait(20)
    assert told == ["Google Cloud preempts this instance"]
    assert capsys.readouterr().out.count("no word from gcp on interruptions: HTTPError: HTTP Error 50") == 2


def test_the_watcher_ends_with_its_work(metadata):
    metadata.answers = {}
    with Watcher("aws", lambda notice: None, every=60) as watcher:
        pass
    assert not watcher._thread.is_alive()
