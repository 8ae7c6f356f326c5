"""Is this the released checkpoint, whole and as published? Every file, tensor and network checked, and one picture drawn per routing."""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from paris_ray.data.clip import read_clip
from paris_ray.data.codec import read_vae
from paris_ray.headers import Header, Shape, read_header
from paris_ray.inference.release_report import Check, Drawn, Report
from paris_ray.inference.strict import PICKLED, load_expert, load_router, read_config
from paris_ray.inference.weights import load_model, read_info
from paris_ray.layout import EXPERT_FILE, INFO, ROUTER_FILE, TEXT_FILE, VAE_FILE
from paris_ray.manifest import MANIFEST, damage, published
from paris_ray.storage import Folder

XL2 = {"hidden_size": 1152, "num_layers": 28, "num_heads": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "text_embed_dim": 768}
B2 = {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "patch_size": 2, "in_channels": 4, "num_clusters": 8}
SD_VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}
VIT_L14 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "expert": (XL2, 605_970_448), "router": (B2, 129_136_904), "vae": (SD_VAE, 83_653_863), "text_encoder": (VIT_L14, 123_060_480),
}  # fmt: skip
"""Shapes of the released networks, and their parameters: of expert and router as the public module lists count them, of sd-vae-ft-mse and of CLIP
ViT-L/14's text tower as their libraries do."""

FILES = {"expert": EXPERT_FILE, "router": ROUTER_FILE, "vae": VAE_FILE, "text_encoder": TEXT_FILE}

AT_ZERO = ("cross_attn.out_proj.weight", "final_layer.linear.weight", "adaLN_modulation.1.weight")
"""Ends of the names of matrices that are zero before training, and may be after a little of it."""

ROUTINGS = ("top-1", "top-2", "full")
PROMPT, SEED = "a photograph of a red fox in a snowy forest", 0


Shapes = dict[str, Shape]


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
    ignore_settings: Collection[str] = (),
    norm_eps: float | None = None,
    threads: int = 1,
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
        ignore_settings: names of unknown settings that the networks' configs may hold besides.
        norm_eps: epsilon of the networks' norms; ``None`` is their configs', or else 1e-6.
        threads: of this process while drawing on a CPU; a picture's last bits depend on them.
        say: told what is being done.
    """
    allowed: dict[str, Any] = {"ignore_settings": ignore_settings, "norm_eps": norm_eps}
    folder, report = Folder(path), Report()
    asked = {"tensors allowed besides": ignore_tensors, "settings allowed besides": ignore_settings, "epsilon of the norms": norm_eps and [norm_eps]}
    report.options = "; ".join(f"{what}: {', '.join(map(str, given))}" for what, given in asked.items() if given)
    names = [entry.name for entry in folder.files(recursive=True)]
    for entry in folder.files(recursive=True):
        say(f"sha256 of {entry.name}")
        report.files.append((entry.name, entry.size, folder.sha256(entry.name)))
    config: dict[str, Any] = {}
    report.attempt("config.json", lambda: _top_config(folder, config))
    report.name = str(config.get("model_name", "unknown"))
    count, latent = config.get("num_experts", 8), config.get("image_size", 32)
    info: dict[str, Any] = {}
    if INFO in names:
        report.attempt(INFO, lambda: f"format {_own(folder, info)['format']}")
    needed = _parts(count, info)
    report.attempt("all parts are there", lambda: _all_there(names, needed))
    report.attempt("no pickled weights", lambda: _no_pickles(names))
    if MANIFEST in names:
        report.attempt("checksums", lambda: _as_listed(folder))

    def expert(part: Folder) -> Shapes:
        return _shapes(load_expert(part, latent, ignore_tensors, **allowed)[0])

    def router(part: Folder) -> Shapes:
        found = load_router(part, latent, ignore_tensors, **allowed)
        if found.num_clusters != count:
            raise Mismatch(f"num_clusters is {found.num_clusters}, config.json has {count} experts")
        return _shapes(found)

    kinds: dict[str, tuple[str, Callable[[Folder], Shapes]]] = {f"expert_{k}": ("expert", expert) for k in range(count)}
    kinds["router"] = ("router", router)
    if f"vae/{VAE_FILE}" in needed:
        kinds["vae"] = ("vae", lambda part: read_vae(part.local(), part.uri))
    if f"text_encoder/{TEXT_FILE}" in needed:
        kinds["text_encoder"] = ("text_encoder", lambda part: read_clip(part.local(), part.uri)[1])
    for name, (kind, fit) in kinds.items():
        say(name)
        _network(report, folder / name, kind, fit, set(ignore_tensors), values=pictures)
    if pictures:
        _pictures(report, folder, device, precision, steps, max_resident, threads, {**allowed, "ignore_tensors": ignore_tensors}, say)
    return report


def _top_config(folder: Folder, config: dict[str, Any]) -> str:
    found = read_config(folder)
    wanted = {"num_experts": int, "image_size": int, "num_channels": int}
    if wrong := [key for key, kind in wanted.items() if type(found.get(key)) is not kind or not 1 <= found[key] <= 4096]:
        raise Mismatch(f"{', '.join(wrong)}: missing, or no whole number")
    config.update(found)
    return f"{found['num_experts']} experts, latents {found['num_channels']} × {found['image_size']} × {found['image_size']}"


def _own(folder: Folder, info: dict[str, Any]) -> dict[str, Any]:
    info.update(read_info(folder))
    return info


def _parts(count: int, info: dict[str, Any]) -> list[str]:
    """Names of the files that a model must have. One of our own may have other encoders than the released one."""
    networks = {**{f"expert_{k}": EXPERT_FILE for k in range(count)}, "router": ROUTER_FILE}
    if info.get("codec", {}).get("kind", "vae") == "vae":
        networks["vae"] = VAE_FILE
    if info.get("text", {}).get("kind", "clip") == "clip":
        networks["text_encoder"] = TEXT_FILE
    return ["config.json", *(f"{part}/{name}" for part, weights in networks.items() for name in ("config.json", weights))]


def _all_there(names: Sequence[str], needed: Sequence[str]) -> str:
    if absent := [name for name in needed if name not in names]:
        raise Mismatch(f"missing: {', '.join(absent)}")
    return f"{len(names)} files"


def _no_pickles(names: Sequence[str]) -> str:
    if pickled := [name for name in names if name.endswith(PICKLED)]:
        raise Mismatch(f"{', '.join(pickled)}: pickled weights can run code when they are read; nothing here reads them. Take them out of the folder")
    return "safetensors only"


def _as_listed(folder: Folder) -> str:
    """Against the list that the assembly left; a released checkpoint has none."""
    found = published(folder) or {}
    if broken := damage(folder, found, verify=True):
        raise Mismatch(f"{'; '.join(broken)}, by {MANIFEST}")
    return f"{len(found['files'])} files are those of {MANIFEST}"


# -- networks -----------------------------------------------------------------------------------------------------------


def _shapes(module: Any) -> Shapes:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def _network(report: Report, folder: Folder, kind: str, fit: Callable[[Folder], Shapes], ignore: set[str], values: bool) -> None:
    """Check one network.

    Args:
        report: what was found goes here.
        folder: of the network.
        kind: a key of :data:`PUBLISHED`.
        fit: compares the file with its config, without reading weights; gives the network's tensors.
        ignore: names of tensors that the file may hold besides.
        values: also look at the weights.
    """
    name, where = folder.uri.rsplit("/", 1)[-1], f"{folder.uri}/{FILES[kind]}"
    header: Header = {}
    shapes: Shapes = {}

    def read() -> str:
        header.update(read_header(folder.local_copy(FILES[kind]), where))
        return f"{len(header)} tensors"

    def loads() -> str:
        shapes.update(fit(folder))
        found = "every tensor with its shape, none besides"
        return f"{found}; all values finite{_values(folder.local_copy(FILES[kind]), header.keys() - ignore)}" if values else found

    there = report.attempt(f"{name}: header", read)
    loaded = report.attempt(f"{name}: loads strictly", loads)
    tensors = shapes or {tensor: shape for tensor, (shape, _) in header.items() if tensor not in ignore}
    parameters = sum(math.prod(shape) for shape in tensors.values())
    counted = report.attempt(f"{name}: parameters", lambda: _published(folder, kind, parameters)) if there else False
    published = counted and report.checks[-1].found.endswith("as published")
    types = ", ".join(sorted({dtype for _, dtype in header.values()}))
    total = f"{parameters:,}" if header else "?"
    known = "yes" if published else "another size" if counted else "no"
    report.networks.append((name, str(len(header)), types, total, known, "yes" if loaded else "no"))


def _published(folder: Folder, kind: str, count: int) -> str:
    config, (size, published) = read_config(folder), PUBLISHED[kind]
    config = config.get("text_config", config)
    if any(config.get(key) != value for key, value in size.items()):
        return f"{count:,}; not the published size, so there is no number to compare with"
    if count != published:
        raise Mismatch(f"{count:,}, published are {published:,}")
    return f"{count:,}, as published"


def _values(path: str, names: Collection[str]) -> str:
    """Look at the weights themselves; returns a note on those that are zero and may be."""
    from safetensors import safe_open

    zero = []
    with safe_open(path, framework="pt") as file:
        for name in sorted(names):
            tensor = file.get_tensor(name)
            if not bool(tensor.isfinite().all()):
                raise Mismatch(f"tensor {name} has values that are not finite")
            if tensor.dim() > 1 and not bool(tensor.any()):
                if not name.endswith(AT_ZERO):
                    raise Mismatch(f"tensor {name} is all zeros, as in a file that was not downloaded whole")
                zero.append(name)
    more = f" and {len(zero) - 3} more" if len(zero) > 3 else ""
    return f"; all zeros, as before training: {', '.join(zero[:3])}{more}" if zero else ""


# -- pictures -----------------------------------------------------------------------------------------------------------


def _pictures(
    report: Report,
    folder: Folder,
    device: str,
    precision: str,
    steps: int,
    max_resident: int | None,
    threads: int,
    allowed: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    from paris_ray.inference.engine import Engine, ImageRequest, generate
    from paris_ray.inference.experts import LocalExperts

    say("router, VAE and text encoder")
    models = []

    def load() -> str:
        model = load_model(folder.uri, device, precision, **allowed)
        models.append(model)
        return f"VAE {model.codec.fingerprint}, text encoder {model.text_encoder.fingerprint}, {model.image_size} pixels"

    if not report.attempt("VAE and text encoder load", load):
        for routing in ROUTINGS:
            report.checks.append(Check(f"picture with {routing}", False, "not drawn: the model does not load"))
        return
    model = models[0]
    engine, guidance = Engine(model, LocalExperts(model, threads=threads, lazy=True, max_resident=max_resident)), 7.5
    report.settings = f"“{PROMPT}”, seed {SEED}, {steps} Euler steps, guidance {guidance}, {precision} on {_device(device, threads)}"
    for routing in ROUTINGS:

        def draw(routing: str = routing) -> str:
            say(f"picture with {routing}, {steps} steps")
            began = time.monotonic()
            chosen = f"top-{min(int(routing[4:]), model.num_experts)}" if routing.startswith("top-") else routing
            request = ImageRequest(PROMPT, seed=SEED, steps=steps, guidance_scale=guidance, routing=chosen, solver="euler")
            (result,) = generate(engine, [request])
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


def _device(device: str, threads: int) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"a CPU with {threads} thread{'s' * (threads > 1)}"
