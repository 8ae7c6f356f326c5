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

**The fold.** A DiT's block i computes its modulation m_i(t) = W_i f(t) + b_i with f(t) = SiLU(time(t) + class); ours is W f(t) + b + table_i. Over
a grid of times, Σ_i Σ_t ‖m_i(t) − W f(t) − b − table_i‖² is least for W = mean_i W_i and b + table_i = mean_t(m_i(t) − W f(t)): given W, the
constants are the means, and what is left, Σ_i ‖(W_i − W) F‖² with F the centred features, has its gradient Σ_i (W_i − W) F Fᵀ vanish at the mean. We
set b = mean_i b_i. The class is DiT's "no class" (the last row of its table), added to the time MLP's last bias, which is exact. So the network
starts as the class-free DiT but for the parts of the modulations that vary with time in ways of their own; the report says how much that is.

diffusers' DiT holds the time MLP once per block: the first is kept, the others count in the m_i. Its code takes the sinusoids at frequencies
10000^(−k/127) where DiT and we have 10000^(−k/128); weights converted from DiT were trained with the latter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paris_ray.models.dit import DiT
from paris_ray.models.layers import timestep_embedding
from paris_ray.storage import safetensors_at

FOLD_TIMES = 200
"""Times on DiT's 0…1000 scale, evenly spaced, over which adaLN is folded."""

Sources = tuple[str, ...]


@dataclass(frozen=True)
class Folded:
    """A tensor computed from several.

    Attributes:
        sources: their names in the file.
        residual: root mean square of what the fold loses over that of the modulation it stands for; 0 is exact.
    """

    sources: Sources
    residual: float


@dataclass(frozen=True)
class InitReport:
    """Where every tensor of the network came from, and where every tensor of the file went.

    Attributes:
        layout: ``dit``, ``dit_diffusers``, ``pixart`` or ``paris``.
        kept: ours ← the file's, unchanged but for stacking.
        folded: ours ← computed from the file's.
        new: ours, left as the constructor made them, and why.
        dropped: the file's, wholly or in part, and why.
    """

    layout: str
    kept: dict[str, Sources]
    folded: dict[str, Folded]
    new: dict[str, str]
    dropped: dict[str, str]

    @property
    def residual(self) -> float:
        """The largest residual of a fold; 0 where nothing was lost."""
        return max((one.residual for one in self.folded.values()), default=0.0)

    def as_json(self) -> dict[str, Any]:
        """The report as JSON."""
        return asdict(self)

    def __str__(self) -> str:
        counts = f"{len(self.kept)} tensors kept, {len(self.folded)} folded, {len(self.new)} new, {len(self.dropped)} of the file's dropped"
        return f"initialised from layout {self.layout}: {counts}; largest residual of a fold {self.residual:.3g}"


def init_from(model: DiT, source: str | os.PathLike[str]) -> InitReport:
    """Give a new expert the weights of a file.

    Args:
        model: as its constructor made it; changed in place.
        source: path or URI of a safetensors file, or of a folder with one (or with the shards of one) and perhaps its ``config.json``.

    Raises:
        FileNotFoundError: no safetensors there.
        ValueError: pickled weights, an unknown layout, or a trunk that is not the network's; the message names the tensors.
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
            "Convert them to safetensors where you trust them (safetensors.torch.save_file)."
        )
    folder, names = safetensors_at(path)
    if not names:
        found = ", ".join(entry.name for entry in folder.files())
        why = f"holds no safetensors file, only {found}; convert what is there first" if found else "does not exist"
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
        config: of the network they are from; only its number of heads is read, which tensors do not show.
        where: what to call them in messages.
    """
    layout = next((name for name, mark in _MARKS.items() if mark in tensors), None)
    if layout is None:
        marks = ", ".join(_MARKS.values())
        raise ValueError(f"init_from: {where} is in no known layout: it has none of {marks}, but {_some(sorted(tensors))}")
    heads, theirs = model.layers[0].attn.num_heads, config.get("num_attention_heads", config.get("num_heads"))  # type: ignore[union-attr]
    if theirs not in (None, heads):
        raise ValueError(f"init_from: {where} has {theirs} attention heads, this network {heads}: they cannot share weights; set num_heads")
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

    values = {ours: torch.cat([tensors[name] for name in sources]) for ours, sources in copies.items()}
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
        added, folded = _fold(tensors, folds)
        values |= added
    new |= {ours: _why_new(ours) for ours in state if ours not in values and ours not in new}
    with torch.no_grad():
        for ours, value in values.items():
            state[ours].copy_(value)
    return InitReport(layout, copies, folded, new, dropped)


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


@dataclass(frozen=True)
class _Adaln:
    """Names of what makes one block's modulation in a DiT: the linear layer, the two of the time MLP, the table of classes."""

    modulation: str
    time: tuple[str, str]
    classes: str

    def sources(self) -> list[Sources]:
        """Names of the linear layers' tensors, and of the table."""
        return [(f"{layer}.weight", f"{layer}.bias") for layer in (self.modulation, *self.time)] + [(self.classes,)]


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
) -> tuple[dict[str, Sources], list[_Adaln], dict[str, str]]:
    """What is copied (ours ← theirs, stacked), which adaLN is folded, and what of the file is dropped, and why."""
    copies: dict[str, Sources] = {}
    folds: list[_Adaln] = []
    drop: dict[str, str] = {}  # prefix of a name → why
    if layout == "paris":
        copies = {ours: (ours,) for ours in state}
    elif layout == "dit":
        copies = _linear("patch_embed", "x_embedder.proj") | {"pos_embed": ("pos_embed",)}
        folds = [_Adaln(f"blocks.{i}.adaLN_modulation.1", ("t_embedder.mlp.0", "t_embedder.mlp.2"), _CLASSES) for i in range(depth)]
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
            folds.append(_Adaln(f"{here}.linear", time, f"{here}.emb.class_embedder.embedding_table.weight"))
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
        return "the fixed sine-cosine table, which is theirs too at interpolation scale 1"
    if ".cross_attn." in ours:
        return "no cross-attention there; this one adds nothing at first, its output projection being zero"
    return "another text encoder" if ours.startswith("text_proj.") else "the final layer learns another target"


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _some(items: list[str]) -> str:
    return "; ".join(items[:8]) + (f"; … and {len(items) - 8} more" if len(items) > 8 else "")


# -- adaLN into adaLN-single --------------------------------------------------------------------------------------------


def _features(tensors: Mapping[str, Tensor], block: _Adaln) -> Tensor:
    """What a block's modulation is linear in, SiLU(time MLP + no class), over the grid of times: (FOLD_TIMES, D) float64."""
    first, second = block.time
    h: Tensor = timestep_embedding(torch.arange(FOLD_TIMES) * (1000.0 / FOLD_TIMES), tensors[f"{first}.weight"].shape[1]).double()  # (T, 256)
    h = F.silu(F.linear(h, tensors[f"{first}.weight"].double(), tensors[f"{first}.bias"].double()))
    h = F.linear(h, tensors[f"{second}.weight"].double(), tensors[f"{second}.bias"].double())  # (T, D)
    return F.silu(h + tensors[block.classes][-1].double())


def _fold(tensors: Mapping[str, Tensor], blocks: list[_Adaln]) -> tuple[dict[str, Tensor], dict[str, Folded]]:
    """The module's rule: values of ``t_block.1``, all tables and the last time bias, and the report on them."""
    weights, biases = [f"{block.modulation}.weight" for block in blocks], [f"{block.modulation}.bias" for block in blocks]
    weight, bias = _mean(tensors, weights), _mean(tensors, biases)  # (6D, D), (6D,)
    features = _features(tensors, blocks[0])  # (T, D): ours
    shared = F.linear(features, weight, bias)  # (T, 6D)
    own_bias = f"{blocks[0].time[1]}.bias"
    no_class = tensors[own_bias].double() + tensors[blocks[0].classes][-1].double()
    values = {"t_block.1.weight": weight, "t_block.1.bias": bias, "time_embed.mlp.2.bias": no_class}
    folded = {"time_embed.mlp.2.bias": Folded((own_bias, blocks[0].classes), 0.0)}
    lost = total = 0.0
    for i, block in enumerate(blocks):
        one_time = block.time == blocks[0].time
        theirs = F.linear(features if one_time else _features(tensors, block), tensors[weights[i]].double(), tensors[biases[i]].double())  # (T, 6D)
        table = (theirs - shared).mean(0)  # (6D,)
        error, size = (theirs - shared - table).square().sum().item(), theirs.square().sum().item()
        lost, total = lost + error, total + size
        # What a block has of its own beside its linear layer: in diffusers' layout all but the first block's time MLP and classes.
        others = () if one_time else tuple(name for names in block.sources()[1:] for name in names)
        values[f"layers.{i}.scale_shift_table"] = table.view(6, -1)
        folded[f"layers.{i}.scale_shift_table"] = Folded((weights[i], biases[i], *others), _ratio(error, size))
    folded["t_block.1.weight"], folded["t_block.1.bias"] = Folded(tuple(weights), _ratio(lost, total)), Folded(tuple(biases), 0.0)
    return values, folded


def _mean(tensors: Mapping[str, Tensor], names: list[str]) -> Tensor:
    """In float64, one after the other: all of a DiT-XL's at once would be 2 GB."""
    total = torch.zeros_like(tensors[names[0]], dtype=torch.float64)
    for name in names:
        total += tensors[name]
    return total / len(names)


def _ratio(error: float, size: float) -> float:
    return (error / size) ** 0.5 if size > 0 else 0.0
