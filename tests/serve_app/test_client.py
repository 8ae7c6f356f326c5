"""The command's client against a server that says what a test tells it to."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from serve_app import client


class Canned(BaseHTTPRequestHandler):
    status, kind, body = 200, "text/event-stream", b""
    asked: dict = {}  # noqa: RUF012

    def do_POST(self):
        type(self).asked = {"path": self.path, **json.loads(self.rfile.read(int(self.headers["content-length"])))}
        self.send_response(self.status)
        self.send_header("content-type", self.kind)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    http = ThreadingHTTPServer(("127.0.0.1", 0), Canned)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


def preview(index, number, content):
    data = {"type": "image_generation.partial_image", "b64_json": base64.b64encode(content).decode(), "index": index, "partial_image_index": number}
    return f"event: {data['type']}\ndata: {json.dumps(data)}\n\n"


def done(index, content, degraded=()):
    data = {"type": "image_generation.completed", "b64_json": base64.b64encode(content).decode(), "index": index, "seed": 9}
    data |= {"degraded": list(degraded), "routing": [{"t": 1.0, "weights": [0.25, 0.75]}, {"t": 0.5, "weights": [0.75, 0.25]}]}
    return f"event: {data['type']}\ndata: {json.dumps(data)}\n\n"


def say(monkeypatch, *events, status=200, kind="text/event-stream"):
    monkeypatch.setattr(Canned, "status", status)
    monkeypatch.setattr(Canned, "kind", kind)
    monkeypatch.setattr(Canned, "body", "".join(events).encode())


def test_files_are_written_as_they_come_and_previews_beside_them(server, monkeypatch, tmp_path, capsys):
    say(monkeypatch, preview(1, 0, b"early"), ": still working\n\n", done(1, b"second", [3]), done(0, b"first"))
    out = tmp_path / "cat.png"
    assert client.main(["a cat", "--url", server, "--n", "2", "--seed", "9", "--previews", "1", "--out", str(out)]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "cat-0.png": b"first",
        "cat-1.png": b"second",
        "cat-1-preview-0.png": b"early",
    }
    said = capsys.readouterr()
    assert "seed 9, picture 1; expert 0 50%, expert 1 50%" in said.out
    assert "preview 1 of 1" in said.err
    assert "still working" in said.err
    assert "Made without expert 3" in said.err
    assert Canned.asked == {"path": "/v1/images/generations", "prompt": "a cat", "n": 2, "seed": 9, "partial_images": 1, "output_format": "png",
                            "stream": True}  # fmt: skip


def test_one_picture_keeps_the_name(server, monkeypatch, tmp_path):
    say(monkeypatch, done(0, b"whole"))
    assert client.main(["a cat", "--url", server, "--out", str(tmp_path / "cat.jpg")]) == 0
    assert (tmp_path / "cat.jpg").read_bytes() == b"whole"
    assert Canned.asked["output_format"] == "jpeg"


def test_what_was_done_before_an_error_is_kept(server, monkeypatch, tmp_path, capsys):
    error = {"type": "error", "error": {"message": "expert 1 has gone", "type": "server_error", "param": None, "code": "expert_unavailable"}}
    say(monkeypatch, done(0, b"first"), f"event: error\ndata: {json.dumps(error)}\n\n")
    assert client.main(["a cat", "--url", server, "--n", "2", "--out", str(tmp_path / "cat.png")]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["cat-0.png"]
    assert "error: expert 1 has gone" in capsys.readouterr().err


def test_an_answer_that_is_cut_off_is_an_error(server, monkeypatch):
    say(monkeypatch, done(0, b"first"))
    with pytest.raises(client.ServerError, match="1 of 2 pictures still to come"):
        list(client.stream(server, prompt="a cat", n=2))


@pytest.mark.parametrize(
    ("status", "kind", "body", "message"),
    [
        (429, "application/json", '{"error": {"message": "busy", "type": "t", "param": null, "code": "queue_full"}}', "busy"),
        (502, "text/html", "<html>proxy</html>", "status 502 and not as this server does"),
        (500, "application/json", "[]", "status 500 and not as this server does"),
        (500, "application/json", '{"error": "no object"}', "status 500 and not as this server does"),
    ],
)
def test_refusals(server, monkeypatch, status, kind, body, message):
    say(monkeypatch, body, status=status, kind=kind)
    for ask in (client.generate, lambda url, **request: list(client.stream(url, **request))):
        with pytest.raises(client.ServerError, match=message) as caught:
            ask(server, prompt="a cat")
        assert caught.value.status == status
        assert caught.value.code == ("queue_full" if status == 429 else None)


def test_an_answer_that_is_no_object(server, monkeypatch):
    say(monkeypatch, "[1]", kind="application/json")
    with pytest.raises(client.ServerError, match="not as this server does"):
        client.generate(server, prompt="a cat")
