"""The fabricated run, and stand-ins for the encoders it was not made with."""

from __future__ import annotations

import sys
import types

import fabricated
import pytest


@pytest.fixture(scope="module")
def stand_ins():
    """Codec, embedder and model of the fabricated run, in place of what reads real weights."""
    from paris_ray.evaluation import facts
    from paris_ray.inference import weights

    with pytest.MonkeyPatch.context() as patch:
        # In place of the module: importing the real one loads timm.
        patch.setitem(sys.modules, "paris_ray.data.embedding", types.SimpleNamespace(build_embedder=lambda spec, device: fabricated.Embedder()))
        patch.setattr(weights, "load_model", fabricated.open_model)
        patch.setattr(facts, "load_decoder", lambda folder, meta: fabricated.decode)
        yield


@pytest.fixture
def run(tmp_path, stand_ins):
    """The config of a fabricated run, complete up to the evaluation."""
    return fabricated.whole_run(tmp_path)
