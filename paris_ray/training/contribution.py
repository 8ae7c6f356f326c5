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
from paris_ray.stages import expert_name, folder
from paris_ray.storage import Folder, copy_file, link_file
from paris_ray.training.budget import total_images

if TYPE_CHECKING:
    from paris_ray.training.expert_task import ExpertTask

CONFIG = "config.yaml"
WEIGHTS = f"export/{EXPERT_FILE}"
TAKEN = ("export/config.json", WEIGHTS)
"""All that is taken of what is handed back; manifest and counts are made here."""
LOSS_TOLERANCE = 1e-2
"""Relative difference between the held-out loss that was reported and the one computed here, on another machine and in float32, where training may
be in bfloat16."""
MOST_BYTES = 1 << 26
"""Of a file that is not weights, and of the header of one that is."""


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
    of the network by name, shape and type and all finite, its held-out loss is the one reported, and that is less than for predicting nothing. Of
    its files the weights and their config are taken, which are looked at in a folder beside; until then nothing of the run is changed.

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
    beside = dataclasses.replace(ours, folder=Folder(config.run_dir) / f"accepting-{name}")
    try:
        beside.folder.delete_all()  # left by one that was cut off
        found = _described(handed / "experts" / str(k), beside)
        task = _task(config, k)
        _bring(handed / "experts" / str(k), beside, _most_bytes(task))
        _load(task, beside.folder)
        measured = _judged(task, found["counts"].get("validation_loss"), name)
        counts = {"images": _images(found["counts"].get("images"), task), "validation_loss": measured["validation_loss"], "rows": task.rows}
        # All that is to come is here and has been looked at; what is there now may go.
        mine = dataclasses.replace(ours, parents=found["inputs"]["parents"])
        mine.begin(rebuild=True)
        for file in TAKEN:
            link_file(beside.folder, file, mine.folder)
        taken = mine.publish(counts, result="export/")
    finally:
        beside.folder.delete_all()
    return {**measured, "bytes": sum(file["bytes"] for file in taken["files"])}


def _described(theirs: Folder, beside: manifest.Stage) -> dict[str, Any]:
    """Their manifest, of this run and saying one thing; a copy of it that names the files that are taken goes to the folder beside."""
    name = beside.name
    if (size := theirs.size(manifest.MANIFEST)) is None:
        raise RefusedError(f"{name}: {theirs.uri} is not a finished training of this run: it is absent or has no {manifest.MANIFEST}")
    if size > MOST_BYTES:
        raise RefusedError(f"{name}: its {manifest.MANIFEST} has {size} bytes, more than {MOST_BYTES}")
    try:
        found = dict(theirs.read_json(manifest.MANIFEST))
        result = [file for file in found["files"] if file["name"].startswith("export/")]
        if missing := set(TAKEN) - {file["name"] for file in result}:
            raise RefusedError(f"{name}: {', '.join(sorted(missing))} is not among its files")
        claimed = manifest.fingerprint({"inputs": found["inputs"], "files": result})
        if found["fingerprint"] != claimed or found["result"] != "export/":
            raise RefusedError(f"{name}: its {manifest.MANIFEST} contradicts itself: the fingerprint is not that of its inputs and files")
        found["counts"] = dict(found["counts"])
        beside.folder.write_json(manifest.MANIFEST, {**found, "files": [file for file in result if file["name"] in TAKEN]})
        status = beside.status()
    except RefusedError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RefusedError(f"{name}: its {manifest.MANIFEST} cannot be read: {type(error).__name__}: {error}") from None
    if status.state == "stale":
        raise RefusedError(f"{name}: {theirs.uri} is not a finished training of this run: {'; '.join(status.reasons)}")
    return found


def _bring(theirs: Folder, beside: manifest.Stage, most: int) -> None:
    """Copy the files that are taken, no larger than they can be, and compare them with the manifest."""
    for file in TAKEN:
        limit = most if file == WEIGHTS else MOST_BYTES
        if (size := theirs.size(file)) is None:
            raise RefusedError(f"{beside.name}: {theirs.uri} is not a finished training of this run: {file} is missing")
        if size > limit:
            raise RefusedError(f"{beside.name}: {file} has {size} bytes, more than the {limit} that it may have")
        copy_file(theirs, file, beside.folder)
    if (status := beside.status(verify=True)).state != "valid":
        raise RefusedError(f"{beside.name}: {theirs.uri} is not a finished training of this run: {'; '.join(status.reasons)}")


def _most_bytes(task: ExpertTask) -> int:
    """What a file of a network's weights may have: each value in the widest type, and a header."""
    return 8 * sum(tensor.numel() for tensor in task.model.state_dict().values()) + MOST_BYTES


def _task(config: RunConfig, k: int) -> ExpertTask:
    """The training task of the expert, with new weights."""
    import torch

    from paris_ray.training.expert_task import ExpertTask

    return ExpertTask(config.model_copy(update={"experts": _from_scratch(config, k)}), k, torch.device("cpu"))


def _load(task: ExpertTask, theirs: Folder) -> None:
    """Put the weights handed back into the task's network, checked by name, shape, type and value."""
    import torch

    from paris_ray.headers import check_header, read_header
    from paris_ray.training.checkpoint import read_tensors

    name, export = task.stage, theirs / "export"
    where = f"{export.uri}/{EXPERT_FILE}"
    try:
        header = read_header(export.local_copy(EXPERT_FILE), where)
        check_header(where, header, {key: tuple(tensor.shape) for key, tensor in task.model.state_dict().items()})
        said = export.read_json("config.json")
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{name}: {error}") from None
    if said != task.export_config():
        raise RefusedError(f"{name}: export/config.json is not this expert's: {'; '.join(manifest.differences(said, task.export_config())[:5])}")
    tensors = read_tensors(export, EXPERT_FILE)
    if bad := [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise RefusedError(f"{name}: {len(bad)} tensors hold values that are not finite, {bad[0]} for one")
    task.model.load_state_dict(tensors)


def _from_scratch(config: RunConfig, k: int) -> Any:
    """The experts' specs without what this one started from: its weights are here, and that may not be."""
    return [spec.model_copy(update={"init_from": None}) if i == k else spec for i, spec in enumerate(config.experts)]


def _images(reported: Any, task: ExpertTask) -> int:
    """How many images it says it was trained on: at most the budget, which grows when rows are appended after it was trained."""
    most = total_images(task.spec.train, task.rows)
    if not isinstance(reported, int) or isinstance(reported, bool) or not 0 < reported <= most:
        raise RefusedError(f"{task.stage}: it says that it was trained on {str(reported)[:40]} images; this run's budget is {most}")
    return reported


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
    if not isinstance(reported, float) or not math.isclose(loss, reported, rel_tol=LOSS_TOLERANCE):
        raise RefusedError(f"{name}: its held-out loss is {loss:.6g} here, and {str(reported)[:40]} by its own account")
    if loss >= nothing:
        raise RefusedError(f"{name}: its held-out loss, {loss:.6g}, is no better than that of predicting nothing, {nothing:.6g}")
    return {"validation_loss": loss, "nothing": nothing}
