"""The pages in a real browser: prompt, previews, picture, strip, errors, keys, history, phone. Skipped where there is no Chromium."""

import base64
import io
import json
import threading
import time

import browser
import pytest
import uvicorn
from PIL import Image
from running import free_port

from serve_app.api import create_app
from serve_app.keys import key_digests
from serve_app.limits import Limits

PROGRAM = browser.found()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason=f"no browser: none of {', '.join(browser.NAMES)} is on the PATH")


def sheet(k):
    file = io.BytesIO()
    Image.new("RGB", (96, 96), ["#c33", "#3c3", "#33c"][k]).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def serve(sampler):
    """Serves applications over the real sampler on ports of their own."""
    servers = []

    def start(**options):
        port = free_port()
        server = uvicorn.Server(uvicorn.Config(create_app(sampler, **options), host="127.0.0.1", port=port, log_level="error"))
        threading.Thread(target=server.run, daemon=True).start()
        while not server.started:
            time.sleep(0.02)
        servers.append(server)
        return f"http://127.0.0.1:{port}/"

    yield start
    for server in servers:
        server.should_exit = True


@pytest.fixture
def page(tmp_path):
    opened = []

    def start(url, **options):
        opened.append(browser.Browser(PROGRAM, tmp_path / f"profile-{len(opened)}", **options))
        opened[-1].open(url)
        return opened[-1]

    yield start
    for one in opened:
        one.close()
        assert one.complaints == []


READY = "!document.getElementById('go').disabled"
DONE = "document.getElementById('stop').hidden && !document.getElementById('result').hidden && document.getElementById('result').className === ''"
PICTURE = "document.getElementById('picture').src"


def make(one, prompt, steps=200):
    """Type a prompt and press Enter."""
    one.wait(READY)
    one.run(f"document.getElementById('steps').value = {steps}")
    one.run("document.getElementById('prompt').value = ''; document.getElementById('prompt').focus()")
    one.type(prompt)
    one.press("Enter", 13, "\r")


def test_a_prompt_becomes_previews_a_picture_and_a_strip(serve, page, sampler):
    one = page(serve(sheet=sheet))
    make(one, "red apple")
    preview = one.wait(f"document.getElementById('picture').alt === 'A preview' && {PICTURE}")
    one.wait(DONE)
    final = one.run(PICTURE)
    assert preview.startswith("data:image/png;base64,")
    assert final != preview
    body = json.loads(Image.open(io.BytesIO(base64.b64decode(final.partition(",")[2]))).info["routing"])
    rects = one.run("document.querySelectorAll('#strip rect').length")
    assert rects == sum(weight > 0 for step in body["steps"] for weight in step["weights"])
    shares = [sum(step["weights"][k] for step in body["steps"]) / len(body["steps"]) for k in range(3)]
    names = one.run("[...document.querySelectorAll('#legend li')].map((item) => item.innerText)")
    assert len(names) == 3
    for text in names:
        k = int(text.split()[1])
        assert f"{round(100 * shares[k])} %" in text or shares[k] < 0.01
    # Beside each its cluster's contact sheet, which a click enlarges.
    one.wait("document.querySelectorAll('#legend .sheet img').length === 3")
    one.click("#legend .sheet")
    one.wait("document.getElementById('enlarged').open && document.querySelector('#enlarged img').naturalWidth === 96")


def test_history_brings_back_what_was_asked(serve, page):
    one = page(serve())
    pictures = []
    for prompt in ("red apple", "blue boat"):
        make(one, prompt, steps=3)
        one.wait(f"document.getElementById('picture').alt === {json.dumps(prompt)} && {DONE}")
        pictures.append(one.run(PICTURE))
    assert pictures[0] != pictures[1]
    one.run("document.querySelector('#history button').focus()")
    one.press("ArrowRight", 39)
    one.press("Enter", 13, "\r")
    one.wait("document.getElementById('prompt').value === 'red apple'")
    assert one.run(PICTURE) == pictures[0]


def test_a_download_carries_its_provenance(serve, page):
    one = page(serve())
    make(one, "red apple", steps=3)
    one.wait(DONE)
    one.run("HTMLAnchorElement.prototype.click = function () { window.taken = [this.download, this.href]; }")
    one.click("#download")
    name, href = one.run("window.taken")
    assert name.startswith("red-apple-")
    assert name.endswith("-0.png")
    image = Image.open(io.BytesIO(base64.b64decode(href.partition(",")[2])))
    assert image.info["parameters"].startswith("red apple\n")
    assert "routing" in image.info


def test_errors_are_said_kindly_and_the_page_goes_on(serve, page):
    one = page(serve(limits=Limits(images_per_minute=1, max_images_per_request=1)))
    make(one, "red apple", steps=3)
    one.wait(DONE)
    make(one, "red apple", steps=3)
    said = one.wait("!document.getElementById('error').hidden && document.getElementById('error').innerText")
    assert "more than your limit of 1 a minute" in said
    assert "{" not in said
    assert not one.run("document.getElementById('go').disabled")
    one.complaints[:] = [text for text in one.complaints if "429" not in text]  # the browser notes the status


def test_a_key_is_asked_for_and_kept(serve, page):
    url = serve(key_digests=key_digests("first-key"))
    one = page(url)
    one.wait("document.getElementById('ask').open")
    for key in ("wrong-key", "first-key"):
        one.wait("document.getElementById('ask').open")
        one.run("document.getElementById('key').focus()")
        one.type(key)
        one.press("Enter", 13, "\r")
    make(one, "red apple", steps=3)
    one.wait(DONE)
    one.open(url + "experts")
    one.wait("document.querySelectorAll('#list li').length === 3")
    one.complaints[:] = [text for text in one.complaints if "401" not in text]


def test_who_waits_is_told_of_the_place(serve, page, sampler):
    from paris_ray.inference.engine import ImageRequest

    one = page(serve())
    one.wait(READY)
    with sampler.engine.driving:  # nothing is stepped meanwhile
        ahead = [sampler.engine.submit(ImageRequest("x", seed=i, steps=1)) for i in range(70)]
        make(one, "red apple", steps=3)
        said = one.wait("document.getElementById('place').innerText")
    assert said == "1 picture before yours"  # all seventy are another client's, and clients take turns
    one.wait(DONE)
    assert one.run("document.getElementById('place').innerText") == ""
    [future.result(60) for future in ahead]


def test_experts_and_their_load(serve, page, sampler):
    one = page(serve() + "experts")
    one.wait("document.querySelectorAll('h2').length === 3")
    titles = one.run("[...document.querySelectorAll('h2')].map((title) => title.innerText)")
    assert [title.split() for title in titles] == [["Expert", str(k), "ready"] for k in range(3)]
    sampler.keeper.reconfigure({"retired": [1]}).result(60)
    try:
        text = one.wait("[...document.querySelectorAll('li')].map((item) => item.innerText).find((text) => text.includes('missing'))")
        assert "Expert 1" in text
        assert "retired by the server" in text
    finally:
        sampler.keeper.reconfigure({}).result(60)
    one.wait("!document.body.innerText.includes('missing')")


def test_on_a_phone_nothing_is_wider_than_the_screen(serve, page):
    one = page(serve(sheet=sheet), width=375, height=740)
    make(one, "red apple", steps=5)
    one.wait(DONE)
    assert one.run("document.documentElement.scrollWidth") == 375
    shown = "[...document.querySelectorAll('button, input, select, textarea')].filter((one) => one.offsetParent)"
    assert one.run(f"{shown}.every((one) => one.offsetHeight >= 24)")
