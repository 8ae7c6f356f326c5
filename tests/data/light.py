"""Encoders that cost nothing, for what is about reading, writing and surviving; as a script, a driver that can be killed."""

from __future__ import annotations

import os
import signal
import sys
import time
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from paris_ray import config as configs
from paris_ray.config import DataConfig
from paris_ray.data import attempts, embed, encoders, part, schema
from paris_ray.data.codec import load_codec
from paris_ray.data.sources import open_source
from paris_ray.storage import Folder

TOKENS, WIDTH = 8, 12
META = {
    "text": {"kind": "light", "width": 4, "max_length": TOKENS, "pooling": "mean", "fingerprint": "0"},
    "embedding": {"kind": "light", "width": WIDTH, "image_size": 8, "fingerprint": "0", "bytes": 0},
    "codec": None,
}


class Text:
    """A token per word."""

    max_length = TOKENS

    def tokenize(self, captions):
        ids = np.zeros((len(captions), TOKENS), np.int32)
        lengths = np.zeros(len(captions), np.int32)
        for row, caption in enumerate(captions):
            words = [zlib.crc32(word.encode()) % 30_000 for word in caption.split()][:TOKENS]
            ids[row, : len(words)], lengths[row] = words, len(words)
        return ids, lengths

    def count(self, captions):
        return [len(caption.split()) for caption in captions]


def embedding(pixels):
    """Mean colours of four stripes."""
    n, side = pixels.shape[:2]
    return pixels.reshape(n, 4, side // 4, side, 3).mean((2, 3)).reshape(n, WIDTH).astype(np.float32)


class LightEncode(part.EncodePart):
    """As its parent, with these encoders and the fitted codec."""

    def __init__(self, data, seed, run_dir):
        self.data, self.seed, self.run = DataConfig.model_validate(data), seed, Folder(run_dir)
        self.source, self.meta = open_source(self.data), (self.run / "encoders").read_json(encoders.FILE)
        self.codec, self.text, self.embedder = load_codec((self.run / "encoders").uri, self.meta["codec"]), Text(), embedding
        self.schema = schema.corpus_schema(self.meta, self.data.store_text)


class SlowEncode(LightEncode):
    """Says who and where it is, and can be met in the middle of a file: it writes every batch at once, and takes its time."""

    def __init__(self, data, seed, run_dir):
        super().__init__(data, seed, run_dir)
        part.ROW_GROUP = 1
        import ray

        (self.run / "pids").write_bytes(str(os.getpid()), ray.get_runtime_context().get_node_id().encode())

    def _encode(self, rows):
        time.sleep(0.15)
        return super()._encode(rows)


class MortalEncode(LightEncode):
    """Dies on the part that the run names, as if its memory had run out; says how often."""

    def __init__(self, data, seed, run_dir):
        super().__init__(data, seed, run_dir)
        attempts.ATTEMPTS = 2

    def _encode(self, rows):
        if rows[0].caption.startswith((self.run / "deadly").read_bytes("caption").decode()):
            (self.run / "pids").write_bytes(str(os.getpid()), b"")
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._encode(rows)


class PeakEncode(LightEncode):
    """Says how much memory it took at most, after every part."""

    def __call__(self, table):
        made = super().__call__(table)
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        (self.run / "peaks").write_json(str(os.getpid()), {"VmHWM": int(lines["VmHWM"].split()[0]) / 1024})
        return made


def save_frozen(data, target):
    """In place of the encoders that are not fitted."""
    null = {"states": np.zeros((TOKENS, 4), np.float32), "token_ids": np.zeros(TOKENS, np.int32), "length": np.zeros(1, np.int32)}
    Folder(target).write_bytes(encoders.NULL_TEXT, save(null))
    return META


def lighten(encode=LightEncode):
    """From now on the stage uses these, in this process and in its workers."""
    embed.EncodePart, embed._save_frozen = encode, save_frozen


def light_config(run, source, *sets):
    """A small run over a source, given as YAML."""
    shares = ("data.split.held_out_rows=0.1", "data.split.validation_rows=0.1")
    sizes = ("data.image_size=16", "data.codec.channels=4", "data.encoder_batch=2", "data.rows_per_part=8", "data.store_text=token_ids")
    return configs.load("tiny", [f"run_dir={run}", f"data.source={source}", *shares, *sizes, "data.max_encoders=2", *sets])


if __name__ == "__main__":
    import ray

    lighten(SlowEncode)
    ray.init(address=sys.argv[1], log_to_driver=False)
    embed.embed(light_config(*sys.argv[2:]))
