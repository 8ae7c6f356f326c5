"""The embed stage in this process: stands in for the few calls of Ray that it makes, where Ray itself is not what is tested."""

from __future__ import annotations

import sys
import types

import pytest

ASKED = []
"""What Ray was asked for, for each pass over the units."""


class _Dataset:
    def __init__(self, tables):
        self.tables = tables

    def map_batches(self, worker, fn_constructor_kwargs=None, **options):
        ASKED.append(options)
        worker = worker(**fn_constructor_kwargs) if isinstance(worker, type) else worker
        return _Dataset([worker(table) for table in self.tables])

    def iter_rows(self):
        for table in self.tables:
            yield from table.to_pylist()


def _remote(function):
    return types.SimpleNamespace(options=lambda **_: types.SimpleNamespace(remote=function))


@pytest.fixture
def in_process(monkeypatch):
    ray, data = types.ModuleType("ray"), types.ModuleType("ray.data")
    context = types.SimpleNamespace(enable_progress_bars=True, print_on_execution_start=True)
    data.DataContext = types.SimpleNamespace(get_current=lambda: context)
    data.from_arrow = _Dataset
    data.ActorPoolStrategy = lambda **_: None
    ray.data, ray.remote, ray.get, ray.wait = data, _remote, lambda one: one, lambda many: (many[:1], many[1:])
    ray.nodes = lambda: []
    ray.cluster_resources = lambda: {"CPU": 1}
    ray.exceptions = types.SimpleNamespace(RayTaskError=type("RayTaskError", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", data)
