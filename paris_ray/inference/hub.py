"""Where a model's folder is: on disk, in an object store, or in a repository of the Hugging Face hub. Imports no torch."""

from __future__ import annotations

import os
import re
from typing import Any

from paris_ray.storage import Folder

CONFIGS = ("*.json", "*.txt", "README.md")
FILES = ("*.safetensors", *CONFIGS)
"""What is fetched of a repository: weights as safetensors, configs, tokenizer files, the card. Nothing that is code or pickled."""


class Snapshot(Folder):
    """A repository at one commit, or a folder in it, in the hub's cache. The weights of an expert are fetched when they are first read.

    The configs of all experts are there from the start, so which ones the repository has is known before, and without a network.

    Args:
        root: of the snapshot in the cache; its last part is the commit.
        repository: ``owner/name``.
        options: of the hub: ``token``, ``cache_dir``, ``local_files_only``.
        inside: name of the folder, below ``root``.
    """

    def __init__(self, root: str, repository: str, options: dict[str, Any], inside: str = ""):
        super().__init__(os.path.join(root, inside))
        self.root, self.repository, self.options, self.inside = root, repository, options, inside
        self.commit = os.path.basename(os.path.normpath(root))

    def __truediv__(self, name: str) -> Snapshot:
        super()._at(name)  # may not leave the folder
        return Snapshot(self.root, self.repository, self.options, os.path.join(self.inside, name))

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (address(self), self.inside)

    def _at(self, name: str) -> str:
        # Whoever reads a file, or asks for it, comes by here.
        path = super()._at(name)
        expert = re.fullmatch(r"(expert_\d+)/.*\.safetensors", os.path.join(self.inside, name))
        if expert and not os.path.exists(path):
            _download(self.repository, self.commit, self.options, [f"{expert[1]}/{pattern}" for pattern in FILES])
        return path


def _again(repository: str, inside: str) -> Folder:
    folder = open_model(repository)
    return folder / inside if inside else folder


def open_model(
    path: str | os.PathLike[str] | Folder,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    configs_only: bool = False,
) -> Folder:
    """The folder of a model.

    Of a repository, everything but the experts' weights is fetched now, and those of an expert when they are first asked for (:class:`Snapshot`), all
    of one commit. What was fetched stays in the hub's cache, and is found there without a network.

    Args:
        path: a local folder, a URI, or ``owner/name`` of the hub, with ``@revision`` if not its main one; a folder of that name goes first. A folder
            that is open already is given back.
        revision: branch, tag or commit of the repository, instead of ``@revision``.
        token: of the hub; ``None`` takes the one logged in with, if any.
        cache_dir: instead of the hub's own cache.
        local_files_only: ask no network.
        configs_only: fetch no weights now.

    Raises:
        FileNotFoundError: neither a folder nor a repository that can be reached; the message says what to do.
        ValueError: two revisions.
    """
    if isinstance(path, Folder):
        return path
    text = os.fspath(path)
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", text)
    folder = Folder(text)
    if match is None or folder.exists():
        return folder
    repository, named = match[1], match[2]
    if named and revision and named != revision:
        raise ValueError(f"revision: {revision!r} beside {text!r}; give one of them")
    options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    files = CONFIGS if configs_only else FILES
    return Snapshot(_download(repository, revision or named, options, files, ["expert_*/*.safetensors"]), repository, options)


def address(folder: Folder) -> str:
    """What another process opens the same model by: the folder's URI, or its repository at its commit."""
    return f"{folder.repository}@{folder.commit}" if isinstance(folder, Snapshot) else folder.uri


def _download(repository: str, revision: str | None, options: dict[str, Any], files: Any, but: list[str] | None = None) -> str:
    """Local path of a repository's snapshot, with the files that match a pattern."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return snapshot_download(repository, revision=revision, allow_patterns=list(files), ignore_patterns=but, **options)
    except GatedRepoError:
        why = "the repository is gated: accept its terms on its page, then log in with 'hf auth login'"
    except RepositoryNotFoundError:
        why = "the hub has no such repository, or it is private and you are not logged in"
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        why = f"the hub could not be asked: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    name = f"{repository}@{revision}" if revision else repository
    raise FileNotFoundError(f"model: {name} is no folder here, and as a repository of the Hugging Face hub: {why}. Give a folder, or mend that.")
