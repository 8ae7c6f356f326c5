"""Is this the released checkpoint, whole and as published? Every file, tensor and network checked, and one picture drawn per routing."""

from __future__ import annotations

import hashlib
import io
import math
import platform
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from paris_ray.inference.strict import EXPERT_FILE, PICKLED, ROUTER_FILE, load_expert, load_router, read_config
from paris_ray.inference.weights import INFO, load_model
from paris_ray.storage import Folder

XL2 = {"hidden_size": 1152, "num_layers": 28, "num_heads": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "text_embed_dim": 768}
B2 = {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "patch_size": 2, "in_channels": 4, "num_clusters": 8}
PUBLISHED = {"expert": (XL2, 605_970_448), "router": (B2, 129_136_904)}
"""Shapes of the released networks, and their parameters as the public module lists count them."""

ROUTINGS = ("top-1", "top-2", "full")
PROMPT, SEED = "a photograph of a red fox in a snowy forest", 0
PARTS = ("config.json", "router/config.json", f"router/{ROUTER_FILE}", "vae/config.json", "text_encoder/config.json")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: whether it holds, and what was found."""

    name: str
    holds: bool
    found: str


@dataclass(frozen=True)
class Drawn:
    """A picture: its routing, PNG, and the checksum of its pixels."""

    routing: str
    png: bytes
    sha256: str
    seconds: float
    shares: list[float]


@dataclass
class Report:
    """What a verification found.

    Attributes:
        name: of the model.
        checks: in the order they were made.
        files: name, bytes, sha256.
        networks: rows of the table of networks.
        pictures: one per routing, if they were asked for.
        settings: how the pictures were drawn.
    """

    name: str = "unknown"
    checks: list[Check] = field(default_factory=list)
    files: list[tuple[str, int, str]] = field(default_factory=list)
    networks: list[tuple[str, ...]] = field(default_factory=list)
    pictures: list[Drawn] = field(default_factory=list)
    settings: str = ""

    @property
    def holds(self) -> bool:
        """Whether everything does."""
        return bool(self.checks) and all(check.holds for check in self.checks)

    def attempt(self, name: str, look: Callable[[], str]) -> bool:
        """Make a check; an error is its failure, and the next one follows all the same."""
        try:
            self.checks.append(Check(name, True, look()))
        except Exception as error:
            self.checks.append(Check(name, False, f"{type(error).__name__}: {error}"))
        return self.checks[-1].holds


class Mismatch(ValueError):
    """Something is not as published."""


def verify(
    path: str,
    pictures: bool = True,
    device: str = "cpu",
    precision: str = "fp32",
    steps: int = 50,
    max_resident: int | None = None,
    ignore_tensors: Collection[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Check a checkpoint in the released layout, to the end whatever is found on the way.

    Networks are loaded one after the other, so that memory for one expert is enough.

    Args:
        path: folder or URI.
        pictures: also look at every weight's value and draw one picture per routing; otherwise headers and checksums only.
        device: where pictures are drawn.
        precision: of the experts for the pictures.
        steps: of each picture.
        max_resident: experts in memory at once while drawing; ``None`` is as many as fit.
        ignore_tensors: names of tensors that weight files may hold besides.
        say: told what is being done.
    """
    folder, report = Folder(path), Report()
    names = [entry.name for entry in folder.files(recursive=True)]
    for entry in folder.files(recursive=True):
        say(f"sha256 of {entry.name}")
        report.files.append((entry.name, entry.size, folder.sha256(entry.name)))
    config: dict[str, Any] = {}
    report.attempt("config.json", lambda: _top_config(folder, config))
    report.name = str(config.get("model_name", "unknown"))
    count, latent = config.get("num_experts", 8), config.get("image_size", 32)
    report.attempt("all parts are there", lambda: _parts(names, count))
    report.attempt("no pickled weights", lambda: _no_pickles(names))
    whole = []
    for k in range(count):
        say(f"expert {k}")
        whole.append(_network(report, folder / f"expert_{k}", "expert", latent, count, ignore_tensors, values=pictures))
    say("router")
    whole.append(_network(report, folder / "router", "router", latent, count, ignore_tensors, values=pictures))
    if pictures:
        _pictures(report, folder, device, precision, steps, max_resident, ignore_tensors, say)
    return report


def _top_config(folder: Folder, config: dict[str, Any]) -> str:
    found = read_config(folder)
    wanted = {"num_experts": int, "image_size": int, "num_channels": int}
    if wrong := [key for key, kind in wanted.items() if type(found.get(key)) is not kind or not 1 <= found[key] <= 4096]:
        raise Mismatch(f"{', '.join(wrong)}: missing, or no whole number")
    config.update(found)
    return f"{found['num_experts']} experts, latents {found['num_channels']} × {found['image_size']} × {found['image_size']}"


def _parts(names: Sequence[str], count: int) -> str:
    needed = [*PARTS, *(f"expert_{k}/{name}" for k in range(count) for name in ("config.json", EXPERT_FILE))]
    if INFO in names:  # a model of our own may have another codec
        needed = [name for name in needed if not name.startswith("vae/")]
    if absent := [name for name in needed if name not in names]:
        raise Mismatch(f"missing: {', '.join(absent)}")
    return f"{len(names)} files"


def _no_pickles(names: Sequence[str]) -> str:
    if pickled := [name for name in names if name.endswith(PICKLED)]:
        raise Mismatch(f"{', '.join(pickled)}: pickled weights can run code when they are read; nothing here reads them. Delete them")
    return "safetensors only"


# -- networks -----------------------------------------------------------------------------------------------------------


def _network(report: Report, folder: Folder, kind: str, latent: int, count: int, ignore: Collection[str], values: bool) -> bool:
    name = folder.uri.rsplit("/", 1)[-1]
    header: dict[str, Any] = {}
    read = report.attempt(f"{name}: header", lambda: _header(folder, EXPERT_FILE if kind == "expert" else ROUTER_FILE, header))
    counted = report.attempt(f"{name}: parameters", lambda: _parameters(folder, kind, header, ignore)) if read else False
    loaded = report.attempt(f"{name}: loads strictly", lambda: _load(folder, kind, latent, count, ignore, values))
    types = ", ".join(sorted({entry["dtype"] for entry in header.values()}))
    total = f"{_count(header, ignore):,}" if header else "?"
    known = counted and _found(report, f"{name}: parameters").endswith("as published")
    report.networks.append((name, str(len(header)), types, total, "yes" if known else "another size" if counted else "no", "yes" if loaded else "no"))
    return read and counted and loaded


def _found(report: Report, name: str) -> str:
    """What a check found, by its name."""
    return next(check.found for check in report.checks if check.name == name)


def _header(folder: Folder, name: str, header: dict[str, Any]) -> str:
    """The header of a safetensors file, read without its weights."""
    from safetensors import safe_open

    with safe_open(folder.local_copy(name), framework="pt") as file:
        names = file.keys()
        for key in names:
            piece = file.get_slice(key)
            header[key] = {"shape": tuple(piece.get_shape()), "dtype": piece.get_dtype()}
    return f"{len(header)} tensors"


def _count(header: dict[str, Any], ignore: Collection[str]) -> int:
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name not in ignore)


def _parameters(folder: Folder, kind: str, header: dict[str, Any], ignore: Collection[str]) -> str:
    config, count = read_config(folder), _count(header, ignore)
    size, published = PUBLISHED[kind]
    if any(config.get(key) != value for key, value in size.items()):
        return f"{count:,}; not the published size, so there is no number to compare with"
    if count != published:
        raise Mismatch(f"{count:,}, published are {published:,}")
    return f"{count:,}, as published"


def _load(folder: Folder, kind: str, latent: int, count: int, ignore: Collection[str], values: bool) -> str:
    import torch

    if kind == "expert":
        module: torch.nn.Module = load_expert(folder, latent, ignore)[0]
    else:
        router = module = load_router(folder, latent, ignore)
        if router.num_clusters != count:
            raise Mismatch(f"num_clusters is {router.num_clusters}, config.json has {count} experts")
    if not values:
        return "every tensor with its shape, none besides"
    for name, tensor in module.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise Mismatch(f"tensor {name} has values that are not finite")
        if tensor.dim() > 1 and not bool(tensor.any()):
            raise Mismatch(f"tensor {name} is all zeros, as in a file that was not downloaded whole")
    return "every tensor with its shape, none besides; all values finite"


# -- pictures -----------------------------------------------------------------------------------------------------------


def _pictures(
    report: Report,
    folder: Folder,
    device: str,
    precision: str,
    steps: int,
    max_resident: int | None,
    ignore: Collection[str],
    say: Callable[[str], None],
) -> None:
    from paris_ray.inference.engine import ImageRequest, generate

    say("router, VAE and text encoder")
    models = []

    def load() -> str:
        model = load_model(folder.uri, device, precision, ignore)
        models.append(model)
        return f"VAE {model.codec.fingerprint}, text encoder {model.text_encoder.fingerprint}, {model.image_size} pixels"

    if not report.attempt("VAE and text encoder load", load):
        for routing in ROUTINGS:
            report.checks.append(Check(f"picture with {routing}", False, "not drawn: the model does not load"))
        return
    model = models[0]
    guidance = 7.5
    report.settings = f"“{PROMPT}”, seed {SEED}, {steps} Euler steps, guidance {guidance}, {precision} on {_device(device)}"
    for routing in ROUTINGS:

        def draw(routing: str = routing) -> str:
            say(f"picture with {routing}, {steps} steps")
            began = time.monotonic()
            chosen = f"top-{min(int(routing[4:]), model.num_experts)}" if routing.startswith("top-") else routing
            request = ImageRequest(PROMPT, seed=SEED, steps=steps, guidance_scale=guidance, routing=chosen, solver="euler")
            (result,) = generate(model, [request], max_resident)
            seconds = time.monotonic() - began
            shares = [sum(step["weights"][k] for step in result.routing) / len(result.routing) for k in range(model.num_experts)]
            checksum = hashlib.sha256(result.image.tobytes()).hexdigest()
            report.pictures.append(Drawn(routing, _png(result.image), checksum, seconds, shares))
            if not (result.image != result.image[0, 0]).any():
                raise Mismatch(f"the picture is one flat colour, {result.image[0, 0].tolist()}")
            if result.degraded:
                raise Mismatch(f"drawn without experts {', '.join(map(str, result.degraded))}")
            return f"pixels sha256 {checksum[:16]}…, {seconds:.1f} s"

        report.attempt(f"picture with {routing}", draw)


def _png(pixels: Any) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _device(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"


# -- the report ---------------------------------------------------------------------------------------------------------


def markdown(report: Report, took: float | None = None) -> str:
    """The report as Markdown, fit to post: no paths of the machine it was made on."""
    import torch

    import paris_ray

    failed = [check for check in report.checks if not check.holds]
    verdict = f"**All {len(report.checks)} checks hold.**" if report.holds else f"**{len(failed)} of {len(report.checks)} checks fail.**"
    system = f"paris_ray {paris_ray.__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"
    lines = [f"# Verification of {_cell(report.name)}", "", verdict, "", system + (f", {took:.0f} s" if took is not None else ""), ""]
    if failed:
        lines += ["## What fails", "", *(f"- **{_cell(check.name)}**: {_cell(check.found)}" for check in failed), ""]
    lines += ["## Networks", "", *_table(("network", "tensors", "types", "parameters", "as published", "loads strictly"), report.networks), ""]
    if report.pictures:
        rows = [(d.routing, f"{d.seconds:.1f} s", " ".join(f"{100 * s:.0f}" for s in d.shares), f"`{d.sha256}`") for d in report.pictures]
        lines += [
            "## Pictures",
            "",
            report.settings,
            "",
            *_table(("routing", "time", "% of the weight, by expert", "sha256 of the pixels"), rows),
            "",
        ]
    lines += ["## Checks", "", *_table(("check", "", "found"), [(c.name, "holds" if c.holds else "**fails**", c.found) for c in report.checks]), ""]
    lines += ["## Files", "", *_table(("file", "bytes", "sha256"), [(name, f"{size:,}", f"`{digest}`") for name, size, digest in report.files])]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(map(_cell, row))} |" for row in (head, ["---"] * len(head), *rows)]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def hide_path(text: str, path: str) -> str:
    """A report without the folder that was checked, which may say whose machine it is."""
    return text.replace(Folder(path).uri + "/", "").replace(Folder(path).uri, "the checkpoint")


def write(report: Report, text: str, out: str) -> None:
    """Write ``report.md`` and the pictures into a folder."""
    folder = Folder(out)
    for drawn in report.pictures:
        folder.write_bytes(f"{drawn.routing}.png", drawn.png)
    folder.write_bytes("report.md", text.encode())
