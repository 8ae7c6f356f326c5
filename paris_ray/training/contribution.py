"""One expert's training for somebody else's machine, and what comes back from it.

:func:`bundle` makes a run directory that holds what one expert needs and nothing else; whoever has it trains with the project's own command,
anywhere. :func:`accept` looks at what they hand back before it joins the run: nothing of it is believed that can be checked.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from paris_ray import config as configs
from paris_ray import manifest, stages
from paris_ray.config import RunConfig
from paris_ray.layout import EXPERT_FILE
from paris_ray.lock import LOCK
from paris_ray.stages import expert_name, folder
from paris_ray.storage import Folder, copy_file

if TYPE_CHECKING:
    from paris_ray.training.expert_task import ExpertTask

CONFIG = "config.yaml"
LOSS_TOLERANCE = 1e-2
"""Relative difference between the held-out loss that was reported and the one computed here, on another machine and in float32, where training may
be in bfloat16."""
MOST_BYTES = 1 << 26
"""Of a file that is not weights."""


class RefusedError(ValueError):
    """What was handed back is not what was asked for; the message says in what."""


def bundle(config: RunConfig, k: int, target: Folder) -> int:
    """Write what expert ``k`` needs to be trained: the run's config, the encoders and its shard, with their manifests.

    Args:
        config: the run's config.
        k: which expert.
        target: an empty folder, which becomes the contributor's run directory.

    Returns:
        bytes written.

    Raises:
        FileNotFoundError: the run has no encoders or no shards yet; names the job to run first.
        ValueError: the target is not empty.
    """
    if target.files(recursive=True):
        raise ValueError(f"{target.uri} is not empty; name a new folder")
    stages.stage(config, expert_name(k))  # what it is made from is there
    run, size = Folder(config.run_dir), 0
    for name, where in (("encoders", "encoders"), (f"shard-{k}", f"shards/expert={k}")):
        found = manifest.published(folder(config, name)) or {}
        for file in found["files"]:
            copy_file(run / where, file["name"], target / where)
            size += file["bytes"]
        copy_file(run / where, manifest.MANIFEST, target / where)  # last, as always
    target.write_bytes(CONFIG, configs.dump(config.without_clusters()).encode())
    return size


def accept(config: RunConfig, k: int, handed: Folder, replace: bool = False) -> dict[str, Any]:
    """Take an expert that was trained elsewhere into the run, if it is what the run would have made.

    It is refused unless it was made from this run's config, encoders and shard, its files have the checksums of its manifest, its weights are those
    of the network by name, shape and type and all finite, its held-out loss is the one reported, and that is less than for predicting nothing.

    Args:
        config: the run's config.
        k: which expert.
        handed: the contributor's run directory.
        replace: take it in the place of a finished expert.

    Returns:
        ``validation_loss`` and ``nothing`` (the loss of predicting nothing), as computed here, and the bytes taken.

    Raises:
        RefusedError: it is not.
        FileExistsError: the run has this expert already.
        FileNotFoundError: the run has no encoders or no shards.
    """
    name = expert_name(k)
    ours = stages.stage(config, name)
    if not replace and ours.status().state == "valid":
        raise FileExistsError(f"{ours.folder.uri} holds a finished {name} already; pass --replace to take this one in its place")
    theirs = dataclasses.replace(ours, folder=handed / "experts" / str(k))
    found = _checked(theirs)
    task = _loaded(config, k, theirs.folder)
    measured = _judged(task, found["counts"].get("validation_loss"), name)
    if ours.folder.files(recursive=True):
        ours.folder.delete_all(keep=(LOCK,))
    for file in found["files"]:
        copy_file(theirs.folder, file["name"], ours.folder)
    copy_file(theirs.folder, manifest.MANIFEST, ours.folder)
    if (state := ours.status(verify=True)).state != "valid":
        raise RefusedError(f"{name}: what was copied is {state.state}: {'; '.join(state.reasons)}; run this again")
    return {**measured, "bytes": sum(file["bytes"] for file in found["files"])}


def _checked(theirs: manifest.Stage) -> dict[str, Any]:
    """Its manifest, whole and of this run."""
    if (theirs.folder.size(manifest.MANIFEST) or 0) > MOST_BYTES:
        raise RefusedError(f"{theirs.name}: its {manifest.MANIFEST} has more than {MOST_BYTES} bytes")
    try:
        status = theirs.status(verify=True)
        if status.state != "valid" or status.manifest is None:
            why = "; ".join(status.reasons) or f"it is {status.state}"
            raise RefusedError(f"{theirs.name}: {theirs.folder.uri} is not a finished training of this run: {why}")
        found = status.manifest
        claimed = manifest.fingerprint({"inputs": found["inputs"], "files": [file for file in found["files"] if file["name"].startswith("export/")]})
        sizes = {file["name"]: file["bytes"] for file in found["files"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise RefusedError(f"{theirs.name}: its {manifest.MANIFEST} cannot be read: {type(error).__name__}: {error}") from None
    if found["fingerprint"] != claimed or found["result"] != "export/":
        raise RefusedError(f"{theirs.name}: its {manifest.MANIFEST} contradicts itself: the fingerprint is not that of its inputs and files")
    weights = f"export/{EXPERT_FILE}"
    if missing := {weights, "export/config.json"} - sizes.keys():
        raise RefusedError(f"{theirs.name}: {', '.join(sorted(missing))} is not among its files")
    if large := [file for file, size in sizes.items() if file != weights and size > MOST_BYTES]:
        raise RefusedError(f"{theirs.name}: {large[0]} has {sizes[large[0]]} bytes, more than {MOST_BYTES} of a file that is not weights")
    return found


def _loaded(config: RunConfig, k: int, theirs: Folder) -> ExpertTask:
    """The training task of the expert with the weights handed back in its network, checked by name, shape, type and value."""
    import torch

    from paris_ray.headers import check_header, read_header
    from paris_ray.training.checkpoint import read_tensors
    from paris_ray.training.expert_task import ExpertTask

    name = expert_name(k)
    task = ExpertTask(config.model_copy(update={"experts": _from_scratch(config, k)}), k, torch.device("cpu"))
    export = theirs / "export"
    where = f"{export.uri}/{EXPERT_FILE}"
    try:
        header = read_header(export.local_copy(EXPERT_FILE), where)
        check_header(where, header, {key: tuple(tensor.shape) for key, tensor in task.model.state_dict().items()})
    except ValueError as error:
        raise RefusedError(f"{name}: {error}") from None
    if (said := theirs.read_json("export/config.json")) != task.export_config():
        raise RefusedError(f"{name}: export/config.json is not this expert's: {'; '.join(manifest.differences(said, task.export_config())[:5])}")
    tensors = read_tensors(export, EXPERT_FILE)
    if bad := [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise RefusedError(f"{name}: {len(bad)} tensors hold values that are not finite, {bad[0]} for one")
    task.model.load_state_dict(tensors)
    return task


def _from_scratch(config: RunConfig, k: int) -> Any:
    """The experts' specs without what this one started from: its weights are here, and that may not be."""
    return [spec.model_copy(update={"init_from": None}) if i == k else spec for i, spec in enumerate(config.experts)]


def _judged(task: ExpertTask, reported: Any, name: str) -> dict[str, float]:
    """Its held-out loss, against what it says, and against that of predicting nothing."""
    import torch

    if not len(task.validation):
        raise RefusedError(f"{name}: its shard has no validation rows, so nothing can be said of its loss; check it by hand")
    loss = float(task.validate()["validation_loss"])

    class Nothing(torch.nn.Module):
        def forward(self, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    task.model = Nothing()
    nothing = float(task.validate()["validation_loss"])
    if not isinstance(reported, int | float) or not math.isclose(loss, reported, rel_tol=LOSS_TOLERANCE):
        raise RefusedError(f"{name}: its held-out loss is {loss:.6g} here, and {reported} by its own account")
    if loss >= nothing:
        raise RefusedError(f"{name}: its held-out loss, {loss:.6g}, is no better than that of predicting nothing, {nothing:.6g}")
    return {"validation_loss": loss, "nothing": nothing}
