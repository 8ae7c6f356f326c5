"""Start an expert from weights that exist: an ImageNet DiT, PixArt-α, or another expert.

What maps is kept, per-block adaLN is folded into adaLN-single, the rest stays as the constructor made it, and a report accounts for every tensor
of both sides. Safetensors only.

==================  ===================================================  =====================================================================
layout              kept                                                 new
==================  ===================================================  =====================================================================
``dit``             patches, positions, time, blocks                     text projection, cross-attention (adds nothing), final layer
``dit_diffusers``   the same                                             the same
``pixart``          patches, time, adaLN-single, blocks with their       text projection
                    cross-attention, final layer without the variance
``paris``           everything                                           nothing
==================  ===================================================  =====================================================================

``dit`` is facebookresearch/DiT's naming, ``dit_diffusers`` that of diffusers' ``DiTTransformer2DModel``, ``pixart`` that of its
``PixArtTransformer2DModel``, ``paris`` ours and the released one. Patches, positions, text projection and last linear layer are new as well where
their shapes differ (another latent, another text encoder); a trunk of another width or depth is refused.

:mod:`paris_ray.models.fold` says how adaLN is folded, and what that loses. An expert that starts from a DiT has the trunk of the class-free DiT, but
for what the fold loses, and puts out zero, because its final layer is new, as in arXiv 2603.06741. PixArt-α's final layer predicts noise and is kept
for an expert that learns velocity, noise less data, too: it starts without the data's part, where a new layer would start without both.

diffusers' DiT holds the time MLP once per block: the first is kept, the others count in what is folded. Its code takes the sinusoids at frequencies
10000^(−k/127) where DiT and we have 10000^(−k/128); weights converted from DiT were trained with the latter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from paris_ray import hub
from paris_ray.models.dit import DiT
from paris_ray.models.fold import Adaln, Folded, Sources, fold
from paris_ray.models.layers import sincos_positions


@dataclass(frozen=True)
class InitReport:
    """Where every tensor of the network came from, and where every tensor of the file went.

    Attributes:
        layout: ``dit``, ``dit_diffusers``, ``pixart`` or ``paris``.
        kept: ours ← the file's, unchanged but for stacking.
        folded: ours ← computed from the file's.
        new: ours, not from the file and as the constructor made them unless it says otherwise, and why.
        dropped: the file's, wholly or in part, and why.
        notes: what else there is to know of the start.
    """

    layout: str
    kept: dict[str, Sources]
    folded: dict[str, Folded]
    new: dict[str, str]
    dropped: dict[str, str]
    notes: tuple[str, ...]

    @property
    def residual(self) -> float:
        """The largest residual of a fold; 0 where nothing was lost."""
        return max((one.residual for one in self.folded.values()), default=0.0)

    def as_json(self) -> dict[str, Any]:
        """The report as JSON."""
        return asdict(self)

    def __str__(self) -> str:
        counts = f"{len(self.kept)} tensors kept, {len(self.folded)} folded, {len(self.new)} new, {len(self.dropped)} of the file's dropped"
        return "; ".join([f"initialised from layout {self.layout}: {counts}; largest residual of a fold {self.residual:.3g}", *self.notes])


def init_from(model: DiT, source: str | os.PathLike[str]) -> InitReport:
    """Give a new expert the weights of a file.

    Args:
        model: as its constructor made it; changed in place.
        source: path or URI of a safetensors file, or of a folder with one (or with the shards of one) and perhaps its ``config.json``; or
            ``owner/name``, ``owner/name/folder`` of the hub, with ``@revision`` if not its main one.

    Raises:
        FileNotFoundError: no safetensors there.
        ValueError: pickled weights, an unknown layout, or a trunk that is not the network's; the message names the tensors or the setting.
    """
    tensors, config, where = read_weights(source)
    return init_from_tensors(model, tensors, config, where)


def read_weights(source: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Tensors by name, the ``config.json`` beside them (empty if there is none), and the place, for messages. See :func:`init_from`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = str(source).rstrip("/")
    if re.search(r"\.(pt|pth|bin|ckpt|pkl|npz)$", path):
        raise ValueError(
            f"init_from: {path} is refused: pickled weights can run code when they are read. "
            f"Where you trust them, convert them: python -m jobs.convert {path} {os.path.splitext(path)[0]}.safetensors"
        )
    folder, names = hub.weights_fetched(path)
    if not names:
        found = [] if path.endswith(".safetensors") else [entry.name for entry in folder.files()]
        why = f"holds no safetensors file, only {', '.join(found)}; convert that first: python -m jobs.convert" if found else "does not exist"
        raise FileNotFoundError(f"init_from: {path} {why}")
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            part = load_file(folder.local_copy(name))
        except SafetensorError as error:
            raise ValueError(f"init_from: {folder.uri}/{name} is not a whole safetensors file ({error}); copy it again") from error
        if twice := tensors.keys() & part.keys():
            raise ValueError(f"init_from: {path} holds tensor {min(twice)} in more than one of {', '.join(names)}; name the file to take")
        tensors |= part
    config = folder.read_json("config.json") if folder.exists("config.json") else {}
    return tensors, config if isinstance(config, dict) else {}, path


def init_from_tensors(model: DiT, tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: str = "the file") -> InitReport:
    """:func:`init_from` for tensors in memory.

    Args:
        model: as its constructor made it; changed in place.
        tensors: by name, in one of the layouts.
        config: of the network they are from, for what tensors do not show: heads, epsilon of norms, activation, places of positions, objective.
        where: what to call them in messages.
    """
    layout = next((name for name, mark in _MARKS.items() if mark in tensors), None)
    if layout is None:
        marks = ", ".join(_MARKS.values())
        raise ValueError(f"init_from: {where} is in no known layout: it has none of {marks}, but {_some(sorted(tensors))}")
    _check_config(model, config, where)
    depth = 1 + max(int(m[1]) for name in tensors if (m := re.match(r"(?:blocks|transformer_blocks|layers)\.(\d+)\.", name)))
    if depth != len(model.layers):
        raise ValueError(f"init_from: {where} has {depth} layers, this network {len(model.layers)}; set num_layers to the same")
    state = model.state_dict()
    copies, folds, dropped = _plan(layout, tensors, depth, state)
    names = [name for sources in [*copies.values(), *(s for block in folds for s in block.sources())] for name in sources]
    if missing := [name for name in names if name not in tensors]:
        raise ValueError(f"init_from: {where} ({layout}) lacks {_some(missing)}")
    if strange := [name for name in tensors if name not in {*names, *dropped}]:
        raise ValueError(f"init_from: {where} ({layout}) holds tensors of unknown meaning: {_some(strange)}; remove them only if they have none")
    shapes = {ours: {tensors[name].shape[1:] for name in sources} for ours, sources in copies.items()}
    if torn := [f"{' and '.join(copies[ours])} for {ours}" for ours, found in shapes.items() if len(found) > 1]:
        raise ValueError(f"init_from: {where} ({layout}) has tensors of unequal width: {_some(torn)}")

    _check_classes(tensors, folds, config, where)

    values = {ours: torch.cat([tensors[name] for name in sources]) for ours, sources in copies.items()}
    patch = values["patch_embed.weight"].shape[-1]
    if config.get("patch_size", patch) != patch:
        raise ValueError(f"init_from: {where} has patches of {patch}, its config.json patch_size {config['patch_size']}; take both from one network")
    if layout == "pixart":
        dropped |= _without_variance(values, copies, state)
    new: dict[str, str] = {}
    for group in _ENDS:
        wrong = [ours for ours in values if ours.startswith(group) and values[ours].shape != state[ours].shape]
        if wrong:
            reason = f"{wrong[0]} is {_shape(values[wrong[0]])} there, {_shape(state[wrong[0]])} here"
            for ours in [ours for ours in values if ours.startswith(group)]:
                new[ours] = reason
                dropped |= dict.fromkeys(copies[ours], reason)
                del values[ours], copies[ours]
    pairs = {ours: (value, state[ours]) for ours, value in values.items()}
    pairs |= {f"{block.modulation}.weight": (tensors[f"{block.modulation}.weight"], state["t_block.1.weight"]) for block in folds}
    if wrong := [f"{name} is {_shape(there)} there, {_shape(here)} here" for name, (there, here) in pairs.items() if there.shape != here.shape]:
        raise ValueError(f"init_from: {where} ({layout}) is not of this network's shape: {_some(wrong)}")

    folded: dict[str, Folded] = {}
    if folds:
        added, folded = fold(tensors, folds)
        values |= added
    new |= {ours: _why_new(ours) for ours in state if ours not in values and ours not in new}
    if "pos_embed" in new and (step := _step_of_positions(layout, config, model.image_size // model.patch_size, patch)) != 1:
        values["pos_embed"] = sincos_positions(state["pos_embed"].shape[-1], model.image_size // model.patch_size, step)
        new["pos_embed"] = f"their fixed sine-cosine table for this grid, with places {step:g} apart: {_positions_said(config)}"
    with torch.no_grad():
        for ours, value in values.items():
            state[ours].copy_(value)
    return InitReport(layout, copies, folded, new, dropped, _notes(layout, copies, model, config, folded))


# -- what tensors do not show -------------------------------------------------------------------------------------------


def _check_config(model: DiT, config: Mapping[str, Any], where: str) -> None:
    heads, theirs = model.layers[0].attn.num_heads, config.get("num_attention_heads", config.get("num_heads"))  # type: ignore[union-attr]
    if theirs not in (None, heads):
        raise ValueError(f"init_from: {where} has {theirs} attention heads, this network {heads}: they cannot share weights; set num_heads")
    if (activation := config.get("activation_fn", "gelu-approximate")) != "gelu-approximate":
        raise ValueError(f"init_from: {where} has activation_fn {activation!r}; this network computes only 'gelu-approximate'")


def _step_of_positions(layout: str, config: Mapping[str, Any], grid: int, patch: int) -> float:
    """How far apart places are in the table that diffusers' model would make for a grid of ours: its own grid spans the same picture."""
    size = config.get("sample_size")
    if layout not in ("dit_diffusers", "pixart") or not isinstance(size, int):
        return 1.0
    scale = config.get("interpolation_scale") or (max(size // 64, 1) if layout == "pixart" else 1)
    return float(size // patch / grid / scale)


def _positions_said(config: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {config[key]}" for key in ("sample_size", "interpolation_scale") if config.get(key) is not None)


LARGE_RESIDUAL = 0.1
"""From here on a fold is said to lose much: a tenth of the modulation is not the pretrained function."""


def _notes(layout: str, kept: Mapping[str, Sources], model: DiT, config: Mapping[str, Any], folded: Mapping[str, Folded]) -> tuple[str, ...]:
    notes, objective = [], config.get("objective")
    if layout in ("dit", "dit_diffusers"):
        notes.append("the trunk is the class-free DiT's but for the residual; the output starts at zero, from a new final layer (arXiv 2603.06741)")
    elif "final_layer.linear.weight" not in kept:
        notes.append("the output starts at zero, from a new final layer")
    elif layout == "pixart":
        notes.append("the final layer is kept: it predicts noise, which a ddpm expert learns; a flow expert learns velocity, noise less data")
    elif objective is not None:
        notes.append(f"the final layer is kept: it predicts {'noise' if objective == 'ddpm' else 'velocity'} (objective {objective} there)")
    worst = max((one.residual for one in folded.values()), default=0.0)
    if worst > LARGE_RESIDUAL:
        notes.append(f"the fold loses much: up to {worst:.0%} of a block's modulation over time; compare losses with an expert that starts anew")
    if config.get("num_attention_heads", config.get("num_heads")) is None:
        heads = model.layers[0].attn.num_heads  # type: ignore[union-attr]
        notes.append(f"the file does not say how many attention heads it has, and no tensor shows it: taken to be {heads}, as here")
    eps, theirs = model.layers[0].norm1.eps, config.get("norm_eps")  # type: ignore[union-attr]
    if theirs not in (None, eps):
        notes.append(f"norm_eps is {theirs:g} there, {eps:g} here")
    return tuple(notes)


# -- layouts ------------------------------------------------------------------------------------------------------------

_MARKS = {
    "dit": "blocks.0.adaLN_modulation.1.weight",
    "dit_diffusers": "transformer_blocks.0.norm1.linear.weight",
    "pixart": "adaln_single.linear.weight",
    "paris": "layers.0.scale_shift_table",
}
"""A tensor that only this layout has."""

_ENDS = ("patch_embed.", "pos_embed", "text_proj.", "final_layer.linear.")
"""What depends on the latent and the text encoder: new, together, where a shape differs."""


def _linear(ours: str, theirs: str) -> dict[str, Sources]:
    return {f"{ours}.{kind}": (f"{theirs}.{kind}",) for kind in ("weight", "bias")}


def _attention(ours: str, projections: Sources, out: str) -> dict[str, Sources]:
    return {f"{ours}.in_proj_{kind}": tuple(f"{one}.{kind}" for one in projections) for kind in ("weight", "bias")} | _linear(f"{ours}.out_proj", out)


def _diffusers_block(ours: str, theirs: str) -> dict[str, Sources]:
    qkv = tuple(f"{theirs}.attn1.to_{one}" for one in "qkv")
    mlp = _linear(f"{ours}.mlp.0", f"{theirs}.ff.net.0.proj") | _linear(f"{ours}.mlp.2", f"{theirs}.ff.net.2")
    return _attention(f"{ours}.attn", qkv, f"{theirs}.attn1.to_out.0") | mlp


def _plan(
    layout: str, tensors: Mapping[str, Tensor], depth: int, state: Mapping[str, Tensor]
) -> tuple[dict[str, Sources], list[Adaln], dict[str, str]]:
    """What is copied (ours ← theirs, stacked), which adaLN is folded, and what of the file is dropped, and why."""
    copies: dict[str, Sources] = {}
    folds: list[Adaln] = []
    drop: dict[str, str] = {}  # prefix of a name → why
    if layout == "paris":
        copies = {ours: (ours,) for ours in state}
    elif layout == "dit":
        copies = _linear("patch_embed", "x_embedder.proj") | {"pos_embed": ("pos_embed",)}
        folds = [Adaln(f"blocks.{i}.adaLN_modulation.1", ("t_embedder.mlp.0", "t_embedder.mlp.2"), _CLASSES) for i in range(depth)]
        for i in range(depth):
            ours, theirs = f"layers.{i}", f"blocks.{i}"
            copies |= _attention(f"{ours}.attn", (f"{theirs}.attn.qkv",), f"{theirs}.attn.proj")
            copies |= _linear(f"{ours}.mlp.0", f"{theirs}.mlp.fc1") | _linear(f"{ours}.mlp.2", f"{theirs}.mlp.fc2")
        drop = {"final_layer.": "the final layer learns another target", _CLASSES: "classes; the last row, no class, is kept in the time bias"}
    else:
        copies = _linear("patch_embed", "pos_embed.proj")
        if "pos_embed.pos_embed" in tensors:  # saved by some versions only; it is the table that we have
            copies["pos_embed"] = ("pos_embed.pos_embed",)
        for i in range(depth):
            copies |= _diffusers_block(f"layers.{i}", f"transformer_blocks.{i}")
    if layout == "dit_diffusers":
        for i in range(depth):
            here = f"transformer_blocks.{i}.norm1"
            time = (f"{here}.emb.timestep_embedder.linear_1", f"{here}.emb.timestep_embedder.linear_2")
            folds.append(Adaln(f"{here}.linear", time, f"{here}.emb.class_embedder.embedding_table.weight"))
            drop[folds[i].classes] = "classes; the last row, no class, is kept in the time bias"
        drop |= {"proj_out_1.": "the final layer learns another target", "proj_out_2.": "the final layer learns another target"}
    if layout == "pixart":
        copies |= _linear("time_embed.mlp.0", "adaln_single.emb.timestep_embedder.linear_1")
        copies |= _linear("time_embed.mlp.2", "adaln_single.emb.timestep_embedder.linear_2") | _linear("t_block.1", "adaln_single.linear")
        copies |= {"final_layer.scale_shift_table": ("scale_shift_table",)} | _linear("final_layer.linear", "proj_out")
        for i in range(depth):
            ours, theirs = f"layers.{i}", f"transformer_blocks.{i}"
            copies[f"{ours}.scale_shift_table"] = (f"{theirs}.scale_shift_table",)
            copies |= _attention(f"{ours}.cross_attn", tuple(f"{theirs}.attn2.to_{one}" for one in "qkv"), f"{theirs}.attn2.to_out.0")
        drop = {"caption_projection.": "two layers for another text encoder; ours is one"}
        size = "conditions on picture size and shape, which this network does not have, so it starts off theirs"
        drop |= {"adaln_single.emb.resolution_embedder.": size, "adaln_single.emb.aspect_ratio_embedder.": size}
    if folds:
        copies |= _linear("time_embed.mlp.0", folds[0].time[0]) | {"time_embed.mlp.2.weight": (f"{folds[0].time[1]}.weight",)}
    return copies, folds, {name: why for name in tensors for prefix, why in drop.items() if name.startswith(prefix)}


_CLASSES = "y_embedder.embedding_table.weight"


def _check_classes(tensors: Mapping[str, Tensor], folds: list[Adaln], config: Mapping[str, Any], where: str) -> None:
    """The fold takes the last row of the classes for "no class", which a DiT has that was trained with class dropout."""
    count = config.get("num_embeds_ada_norm", config.get("num_classes"))
    for name in dict.fromkeys(block.classes for block in folds):
        if isinstance(count, int) and len(tensors[name]) != count + 1:
            raise ValueError(
                f"init_from: {where} has {len(tensors[name])} rows in {name} for {count} classes, so none of them is that of no class; "
                "take a DiT that was trained with class dropout"
            )


def _without_variance(values: dict[str, Tensor], copies: Mapping[str, Sources], state: Mapping[str, Tensor]) -> dict[str, str]:
    """Take the learned variance's rows out of the last layer: within each of the p² places of a patch they follow those of the prediction."""
    theirs, ours = values["final_layer.linear.bias"].shape[0], state["final_layer.linear.bias"].shape[0]
    places = state["patch_embed.weight"].shape[-1] ** 2
    if theirs != 2 * ours:
        return {}
    dropped: dict[str, str] = {}
    for kind in ("weight", "bias"):
        name = f"final_layer.linear.{kind}"
        values[name] = values[name].unflatten(0, (places, 2, -1))[:, 0].flatten(0, 1)
        dropped |= dict.fromkeys(copies[name], "its half that predicts a variance; the other half is kept")
    return dropped


def _why_new(ours: str) -> str:
    if ours == "pos_embed":
        return "the fixed sine-cosine table, which is theirs too"
    if ".cross_attn." in ours:
        return "no cross-attention there; this one adds nothing at first, its output projection being zero"
    return "another text encoder" if ours.startswith("text_proj.") else "the final layer learns another target"


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _some(items: list[str]) -> str:
    return "; ".join(items[:8]) + (f"; … and {len(items) - 8} more" if len(items) > 8 else "")
