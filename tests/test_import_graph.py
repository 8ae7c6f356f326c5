"""Ray stays at the edges, torch out of the drivers, and imports point one way."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

WITHOUT_RAY = [
    "paris_ray.config", "paris_ray.storage", "paris_ray.storage_io", "paris_ray.manifest", "paris_ray.stages", "paris_ray.rng", "paris_ray.progress",
    "paris_ray.presets", "paris_ray.headers", "paris_ray.layout", "paris_ray.resources", "paris_ray.strict", "paris_ray.host_memory",
    "paris_ray.config_errors", "paris_ray.data_config", "paris_ray.opening", "paris_ray.training_config",
    "paris_ray.software", "paris_ray.lock",
    "paris_ray.models", "paris_ray.models.dit", "paris_ray.models.router", "paris_ray.models.layers",
    "paris_ray.diffusion.path", "paris_ray.diffusion.ensemble", "paris_ray.diffusion.routing", "paris_ray.diffusion.sampler",
    "paris_ray.data.schema", "paris_ray.data.sources", "paris_ray.data.sources.folder", "paris_ray.data.sources.parquet",
    "paris_ray.data.sources.webdataset", "paris_ray.data.sources.hf_dataset", "paris_ray.data.part", "paris_ray.data.phash",
    "paris_ray.data.filters", "paris_ray.data.splits", "paris_ray.data.duplicates", "paris_ray.data.images", "paris_ray.data.text",
    "paris_ray.data.clip", "paris_ray.data.codec", "paris_ray.data.embedding", "paris_ray.data.encoders", "paris_ray.data.openmoji",
    "paris_ray.data.scenes", "paris_ray.data.scene_pictures",
    "paris_ray.data.kmeans", "paris_ray.data.nearest", "paris_ray.data.balance",
    "paris_ray.training.loop", "paris_ray.training.ema", "paris_ray.training.checkpoint", "paris_ray.training.shard", "paris_ray.training.draws",
    "paris_ray.training.budget", "paris_ray.training.memory", "paris_ray.training.goodput", "paris_ray.training.placement", "paris_ray.training.plan",
    "paris_ray.training.micro_batch", "paris_ray.training.trackers", "paris_ray.training.student_task",
    "paris_ray.pages.blocks", "paris_ray.pages.charts", "paris_ray.evaluation.metrics",
    "paris_ray.evaluation.compare", "paris_ray.evaluation.compare_report", "paris_ray.evaluation.compare_work", "paris_ray.evaluation.compare_cost",
    "paris_ray.evaluation.distances", "paris_ray.evaluation.intervals", "paris_ray.evaluation.scene_scorer",
    "paris_ray.evaluation.judges", "paris_ray.evaluation.losses", "paris_ray.evaluation.routers",
    "paris_ray.evaluation.compare_measures", "paris_ray.evaluation.compare_scenes", "paris_ray.evaluation.classifiers",
    "paris_ray.hub", "paris_ray.models.network", "paris_ray.models.fold", "paris_ray.models.init_from",
]  # fmt: skip
"""Modules that a machine without Ray can use; all of paris_ray/inference as well."""

DRIVERS = [
    "jobs.embed",
    "jobs.partition",
    "jobs.train_expert",
    "jobs.train_router",
    "jobs.assemble",
    "jobs.evaluate",
    "jobs.run_all",
    "jobs.plan",
    "jobs.compare",
]
"""Job scripts, which must start fast: importing torch takes seconds, and eight of them start at once."""

BLOCK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "{blocked}":
            raise ImportError("{blocked} was imported")
sys.meta_path.insert(0, Refuse())
"""

COMPUTE = """
import importlib, sys, pathlib
for name in sys.argv[2:]:
    importlib.import_module(name)
import numpy as np, torch
from paris_ray.data import balance, kmeans, nearest
from paris_ray.diffusion import ensemble, sampler
from paris_ray.models import DiT, Router

x = np.random.default_rng(0).standard_normal((200, 6)).astype(np.float16)
fit = kmeans.kmeans(kmeans.Rows(x, nearest.scales(x, "cosine", 200)), 8, 0)
coarse = balance.coarse_clusters(fit.centroids, fit.counts, 2, 0, 50, 1.4)
assert np.bincount(coarse.fine_to_coarse, fit.counts).max() <= 140

expert = DiT(image_size=4, in_channels=2, out_channels=2, hidden_size=16, num_layers=1, num_heads=2, text_embed_dim=4)
router = Router(2, image_size=4, in_channels=2, hidden_size=16, num_layers=1, num_heads=2)
class Two:
    num_experts = 2
    def available(self): return [True, True]
    def velocities(self, calls): return [sampler.guided(expert, c.x, c.t, c.cond) for c in calls]
text = torch.randn(3, 5, 4)
cond = ensemble.Conditioning(text, text.mean(1), torch.zeros_like(text), torch.full((3,), 2.0), ("a", "b", "c"), ("null",) * 3)
def velocity(z, t):
    weights = ensemble.routing_weights(router(z, t), ensemble.Routing("top", 2), torch.tensor([True, True]))
    return ensemble.ensemble_velocity(z, t, cond, Two(), weights)
noise = torch.stack([sampler.initial_noise(0, i, (2, 4, 4)) for i in range(3)])
with torch.no_grad():
    assert sampler.sample(velocity, noise, sampler.time_grid(3), "heun").shape == (3, 2, 4, 4)

sys.path.insert(0, "tests/inference")
import tiny_model
from paris_ray.inference.engine import generate
from paris_ray.inference.request import ImageRequest
path = pathlib.Path(sys.argv[1])
(result,) = generate(tiny_model.open_model(path, tiny_model.write_model(path)), [ImageRequest("a red fox", seed=1, steps=2)])
assert result.image.shape == (16, 16, 3)
assert not any(name == "ray" or name.startswith("ray.") for name in sys.modules)
print("computed")
"""


def modules(*packages: str) -> Iterator[tuple[str, Path]]:
    for package in packages:
        for file in sorted((ROOT / package).rglob("*.py")):
            yield ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), file


def imports(file: Path, module: str, when_loaded: bool = False) -> set[str]:
    """Modules that a file imports anywhere, or only when it is loaded; not those under ``if TYPE_CHECKING``."""
    tree = ast.parse(file.read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    if when_loaded:
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        hidden |= {id(inner) for function in functions for inner in ast.walk(function)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False
    )


def test_everything_but_the_edges_computes_without_ray(tmp_path: Path) -> None:
    inference = [name for name, _ in modules("paris_ray/inference")]
    assert "paris_ray.inference.engine" in inference
    done = run(BLOCK.format(blocked="ray") + COMPUTE, str(tmp_path), *WITHOUT_RAY, *inference)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("computed")


def test_no_function_of_them_imports_ray_later() -> None:
    quiet = {*WITHOUT_RAY, *(name for name, _ in modules("paris_ray/inference", "paris_ray/models", "paris_ray/diffusion"))}
    for name, file in modules("paris_ray"):
        if name in quiet:
            assert not {one for one in imports(file, name) if one.split(".")[0] == "ray"}, name


@pytest.mark.parametrize("driver", DRIVERS)
def test_drivers_start_without_torch(driver: str) -> None:
    done = run(BLOCK.format(blocked="torch") + f"import {driver}")
    assert done.returncode == 0, done.stderr[-2000:]


def test_partition_itself_needs_no_torch() -> None:
    done = run(BLOCK.format(blocked="torch") + "import paris_ray.data.partition, paris_ray.data.cluster_report, paris_ray.data.cut")
    assert done.returncode == 0, done.stderr[-2000:]


# -- direction ----------------------------------------------------------------------------------------------------------

LEVELS = [
    {
        "paris_ray",
        "paris_ray.config",
        "paris_ray.config_errors",
        "paris_ray.data_config",
        "paris_ray.opening",
        "paris_ray.training_config",
        "paris_ray.storage",
        "paris_ray.storage_io",
        "paris_ray.lock",
        "paris_ray.manifest",
        "paris_ray.hub",
        "paris_ray.host_memory",
        "paris_ray.stages",
        "paris_ray.rng",
        "paris_ray.progress",
        "paris_ray.presets",
        "paris_ray.headers",
        "paris_ray.layout",
        "paris_ray.placement",
        "paris_ray.resources",
        "paris_ray.software",
        "paris_ray.strict",
        "paris_ray.pages",
    },
    {"paris_ray.diffusion", "paris_ray.models", "paris_ray.data.kmeans", "paris_ray.data.nearest", "paris_ray.data.balance"},
    {"paris_ray.training", "paris_ray.inference", "paris_ray.data", "paris_ray.evaluation"},
    {"jobs", "serve_app"},
]
"""config, manifest, storage ← diffusion, models, data.kmeans ← training, inference, data ← jobs, serve_app."""


def level(module: str) -> int | None:
    """The level of a module: that of the longest name in LEVELS which it is, or is inside of."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        for height, names in enumerate(LEVELS):
            if name in names and (name != "paris_ray" or length == len(parts)):
                return height
    return None


def test_imports_point_one_way() -> None:
    files = dict(modules("paris_ray", "jobs", "serve_app"))
    wrong = []
    for name, file in files.items():
        here = level(name)
        assert here is not None, f"{name} is in no level of the design"
        for target in imports(file, name) & files.keys():
            there = level(target)
            assert there is not None, f"{target} is in no level of the design"
            if there > here:
                wrong.append(f"{name} → {target}")
    assert not wrong, "imports against the direction: " + ", ".join(sorted(wrong))


def test_no_module_imports_itself_through_others() -> None:
    files = dict(modules("paris_ray", "jobs", "serve_app"))
    edges = {name: imports(file, name, when_loaded=True) & files.keys() - {name} for name, file in files.items()}
    # A package's __init__ that gathers its modules' names is not a cycle for them.
    gathering = {name for name, file in files.items() if file.name == "__init__.py"}
    done: set[str] = set()

    def walk(name: str, above: list[str]) -> None:
        assert name not in above, " → ".join([*above[above.index(name) :], name])
        if name in done:
            return
        for target in sorted(edges[name] - gathering):
            walk(target, [*above, name])
        done.add(name)

    for name in sorted(files):
        walk(name, [])


def test_the_levels_themselves() -> None:
    assert [level(name) for name in ("paris_ray.config", "paris_ray.data.kmeans", "paris_ray.data.partition", "jobs.embed")] == [0, 1, 2, 3]
    assert level("paris_ray.unheard_of") is None
