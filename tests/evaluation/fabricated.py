"""A run directory made by hand, as the stages would leave it: 24 pictures, three unlike experts of random weights, everything published."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from paris_ray import config as configs
from paris_ray import stages
from paris_ray.data import schema
from paris_ray.models import Router
from paris_ray.storage import Folder

_spec = importlib.util.spec_from_file_location("tiny_model", Path(__file__).parents[1] / "inference" / "tiny_model.py")
tiny_model = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_model)

HOSTILE = '<script>alert("x")</script> & a "kite"'
FINGERPRINT = "f" * 32
GROUNDS = {"white": (2.0, 2.0, 2.0), "blue": (-1.0, 0.0, 1.9)}
WIDTH = 16
ENCODERS = {
    "image_size": 16,
    "embedding": {"kind": "efficientnet_lite0", "width": WIDTH, "fingerprint": "embedder"},
    "codec": {"kind": "stand-in", "channels": 3, "downsampling": 2, "latent_size": 8, "fingerprint": "codec"},
    "text": {"kind": "stand-in", "width": tiny_model.WIDTH, "max_length": tiny_model.TOKENS, "pooling": "mean", "fingerprint": "text"},
}


def decode(latents):
    return tiny_model.Codec().decode(torch.as_tensor(np.asarray(latents, np.float32)))


class Embedder:
    """A fixed random projection of the pixels."""

    fingerprint = "embedder"

    def __call__(self, images):
        flat = (np.asarray(images, np.float32).reshape(len(images), -1) - 128) / 128
        return flat @ np.random.default_rng(9).normal(size=(flat.shape[1], WIDTH)).astype(np.float32)


def run_config(path, **sets):
    text = [f"run_dir={path}", "data.image_size=16", "data.codec.downsampling=4", *(f"{key}={value}" for key, value in sets.items())]
    return configs.load("tiny", text)


def rows():
    """24 rows: groups 0…10 on both grounds, of which 8 and 9 are held out on blue; group 11 is held out altogether; a row each for validation."""
    out = []
    rng = np.random.default_rng(4)
    for g in range(12):
        thing = rng.normal(size=(3, 6, 6)).astype(np.float32) * 0.8
        for ground, colour in GROUNDS.items():
            latent = np.ones((3, 8, 8), np.float32) * np.array(colour, np.float32)[:, None, None]
            latent[:, 1:-1, 1:-1] = thing
            name = f"{HOSTILE} {g}" if g % 3 == 0 else f"thing {g}"
            caption = name if ground == "white" else f"{name} on a {ground} background"
            held_out = g == 11 or (g in (8, 9) and ground == "blue")
            split = "held_out" if held_out else "validation" if g == 10 else "train"
            out.append({"id": f"{g}-{ground}", "caption": caption, "group": f"g{g}", "split": split, "latent": latent, "expert": g % 3})
    return out


def publish(config, name, counts, seconds):
    stages.stage(config, name).publish(counts, seconds)


def write_data(config):
    """encoders/, corpus/, rejected/, clusters/."""
    run, data = Folder(config.run_dir), rows()
    (run / "encoders").write_json("encoders.json", ENCODERS)
    publish(config, "encoders", {}, 1.5)
    latents = np.stack([row["latent"] for row in data])
    n = len(data)
    columns = {
        "id": [row["id"] for row in data],
        "caption": [row["caption"] for row in data],
        "text": np.zeros((n, tiny_model.TOKENS, tiny_model.WIDTH), np.float16),
        "text_len": [1] * n,
        "latent": latents.astype(np.float16),
        "embedding": Embedder()(decode(latents.astype(np.float16))).astype(np.float16),
        "split": [row["split"] for row in data],
        "group": [row["group"] for row in data],
        "phash": range(n),
        "caption_cut": [False] * n,
        "source": ["made"] * n,
        "width": [16] * n,
        "height": [16] * n,
    }
    whole = schema.table(schema.corpus_schema(ENCODERS, "states"), columns)
    schema.write_table(run / "corpus", schema.part_name(0), whole.slice(0, 10))
    schema.write_table(run / "corpus", schema.part_name(1), whole.slice(10))
    publish(config, "embed", {"rows": n, "rejected": 3}, 12.0)
    refused = schema.REJECTED.empty_table().from_pydict(
        {"source": ["a", "b", "c"], "reason": ["unreadable image: <b>cut</b>", *2 * ["empty caption: it has no characters"]]}
    )
    schema.write_table(run / "rejected", schema.part_name(0), refused)
    labels = pa.table({"id": columns["id"], "fine": [0] * n, "expert": [row["expert"] for row in data], "split": columns["split"]})
    schema.write_table(run / "clusters", "labels.parquet", labels)
    (run / "clusters").write_json("clusters.json", {"sizes": [8, 6, 4], "sizes_all": [8, 8, 8], "metric": "cosine"})
    for k in range(3):
        (run / "clusters").write_bytes(f"contact-{k}.png", png(np.full((16, 48, 3), 80 * k, np.uint8)))
    for k in range(3):
        publish(config, f"shard-{k}", {}, 0.1)
    publish(config, "partition", {"sizes": [8, 6, 4]}, 3.0)


def write_training(config):
    """experts/K, router/, control_router/: manifests and metrics, and the control router's export."""
    run = Folder(config.run_dir)
    router = tiny_model.random_weights(Router(3, tiny_model.SIZE, 2, tiny_model.CHANNELS, 32, 1, 2), 6)
    export = Path(run.uri) / "control_router" / "export"
    tiny_model.write_network(export, router, "pytorch_model.safetensors", tiny_model.router_config(3, False))
    for i, name in enumerate(["expert-0", "expert-1", "expert-2", "router", "control_router"]):
        folder = stages.folder(config, name)
        lines = [{"images": n, "loss": 1.0 / n + 0.1 * i, "images_per_second": 100.0, "seconds": n / 100} for n in (40, 80, 160, 320)]
        folder.write_bytes("metrics/images-000000320.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
        counts = {
            "images": 320,
            "seconds": 3.2,
            "images_per_second": 100.0,
            "loss": lines[-1]["loss"],
            "validation_loss": 0.7,
            "rows": 6,
            "restarts": 0,
        }
        publish(config, name, counts, 3.2)


def write_model(config):
    """model/, as far as the engine reads it."""
    folder = Folder(config.run_dir) / "model"
    path = Path(folder.uri)
    path.mkdir(parents=True)
    info = tiny_model.write_model(path, ("flow", "ddpm", "flow"))
    info |= {"name": "tiny", "model_fingerprint": FINGERPRINT, "attribution": "All emojis designed by OpenMoji. License: CC BY-SA 4.0"}
    (path / "paris.json").write_text(json.dumps(info))
    publish(config, "assemble", {}, 0.5)


def whole_run(path):
    """Everything up to the evaluation; returns the config."""
    config = run_config(path / "run")
    write_data(config)
    write_training(config)
    write_model(config)
    return config


def open_model(path, device):
    return tiny_model.open_model(Path(path), json.loads((Path(path) / "paris.json").read_text()))


def png(image):
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, "PNG")
    return sink.getvalue()


class Server:
    """A server that knows every caption by heart, but for those whose group is in ``wrong``: these get the next group's picture."""

    def __init__(self, wrong=(), degraded=(), fingerprint=FINGERPRINT, busy=0):
        data = rows()
        self.requests = []
        self.degraded, self.fingerprint, self.busy = list(degraded), fingerprint, busy
        by_group = {(row["group"], row["id"].split("-")[1]): row for row in data}
        self.answers = {}
        for row in data:
            group, ground = row["id"].split("-")
            shown = by_group[f"g{(int(group) + 1) % 12}", ground] if row["group"] in wrong else row
            self.answers[row["caption"]] = shown

    def transport(self):
        return httpx.MockTransport(self.handle)

    def handle(self, request):
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "tiny", "fingerprint": self.fingerprint}]})
        if self.busy:
            self.busy -= 1
            return httpx.Response(429, headers={"retry-after": "0.01"}, json={"error": {"message": "full"}})
        body = json.loads(request.content)
        self.requests.append(body)
        row = self.answers[body["prompt"]]
        image = png(decode(row["latent"][None].astype(np.float16))[0])
        weights = [0.0, 0.0, 0.0]
        weights[row["expert"]] = 1.0
        steps = [{"t": 1 - s / 4, "weights": weights} for s in range(4)]
        item = {"b64_json": base64.b64encode(image).decode(), "seed": body["seed"], "index": 0, "routing": steps}
        return httpx.Response(200, json={"created": 0, "data": [item], "seed": body["seed"], "degraded": self.degraded, "timings": {}})
