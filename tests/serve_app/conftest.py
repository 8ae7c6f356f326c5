"""Samplers over the model of served_model.py, in this process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served_model import write_model


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model."""
    root = tmp_path_factory.mktemp("serving") / "model"
    write_model(root)
    return root


@pytest.fixture(scope="session")
def sampler(model_path: Path) -> Iterator[Any]:
    """The real sampler in this process, all experts together."""
    from serve_app.deployments import Sampler

    sampler = Sampler(str(model_path))
    yield sampler
    sampler.close()


@pytest.fixture(scope="session")
def small_sampler(model_path: Path) -> Iterator[Any]:
    """One that steps one picture and lets two wait."""
    from serve_app.deployments import Sampler

    sampler = Sampler(str(model_path), max_rows=1, max_queue=4)
    yield sampler
    sampler.close()


@pytest.fixture(scope="session")
def crippled_sampler(model_path: Path) -> Iterator[Any]:
    """One whose model has no weights for expert 1."""
    from serve_app.deployments import Sampler

    copy = model_path.with_name("crippled")
    shutil.copytree(model_path, copy)
    shutil.rmtree(copy / "expert_1")
    sampler = Sampler(str(copy))
    yield sampler
    sampler.close()
