"""Where weights are: on disk, in an object store, or in a repository of the Hugging Face hub. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from paris_ray.storage import Folder, safetensors_at

Weights = tuple[Folder, list[str]]
"""A folder, and the names of the safetensors files in it that are meant."""

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

    with _asking("model", f"{repository}@{revision}" if revision else repository):
        return snapshot_download(repository, revision=revision, allow_patterns=list(files), ignore_patterns=but, **options)


# -- weights to start from ----------------------------------------------------------------------------------------------


def weights_here(source: str | os.PathLike[str]) -> Weights:
    """The safetensors files that a source names, if they are on disk, in an object store, or in the hub's cache; no names if not.

    Args:
        source: path or URI of a file, or of a folder with them; or ``owner/name``, ``owner/name/folder`` of the hub, with ``@revision`` if not its
            main one. What is on disk under that name goes first.
    """
    found = _look(source)
    if not isinstance(found, _Repository):
        return found
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return found.fetch(local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return Folder(os.fspath(source)), []


def weights_fetched(source: str | os.PathLike[str]) -> Weights:
    """As :func:`weights_here`, fetched from the hub if need be.

    Raises:
        FileNotFoundError: the repository cannot be reached, or has no such file; the message says what to do.
    """
    found = _look(source)
    if not isinstance(found, _Repository):
        return found
    with _asking("init_from", found.text):
        folder, names = found.fetch()
    if not names:
        where = f"in its folder {found.folder}" if found.folder else "outside its folders"
        raise FileNotFoundError(
            f"init_from: {found.text} of the Hugging Face hub has no safetensors {where}; name the folder that has, such as "
            f"{found.name}/transformer, or if there are only pickled weights, download them and use python -m jobs.convert"
        )
    return folder, names


def weights_there(source: str | os.PathLike[str]) -> Weights:
    """As :func:`weights_here`, at the hub if they are not here, to be read in pieces. Raises FileNotFoundError as :func:`weights_fetched`."""
    folder, names = weights_here(source)
    found = _look(source)
    if names or not isinstance(found, _Repository):
        return folder, names
    with _asking("init_from", found.text):
        folder, names = safetensors_at(found.uri)
    return (folder, names) if names else weights_fetched(source)  # which says why there are none


@dataclass(frozen=True)
class _Repository:
    """``owner/name[/folder][@revision]`` of the hub, of which the safetensors directly in the folder are meant."""

    text: str
    name: str
    folder: str
    revision: str | None

    @property
    def uri(self) -> str:
        revision = "" if self.revision is None else "@" + self.revision.replace("/", "%2F")
        return f"hf://{self.name}{revision}/{self.folder}".rstrip("/")

    def fetch(self, local_files_only: bool = False) -> Weights:
        """Raises what the hub's library raises."""
        from huggingface_hub import snapshot_download

        inside = self.folder + "/" if self.folder else ""
        # A pattern's star stands for slashes too.
        cached = snapshot_download(
            self.name, revision=self.revision, local_files_only=local_files_only,
            allow_patterns=[f"{inside}*.safetensors", f"{inside}config.json"], ignore_patterns=[f"{inside}*/*"],
        )  # fmt: skip
        return safetensors_at(os.path.join(cached, self.folder))


def _look(source: str | os.PathLike[str]) -> Weights | _Repository:
    """What is on disk or in a store under that name, or else the repository that it may mean."""
    folder, names = safetensors_at(source)
    text = os.fspath(source)
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?:@([\w./-]+))?", text)
    if names or match is None or text.endswith(".safetensors") or folder.exists():
        return folder, names
    return _Repository(text, match[1], match[2] or "", match[3])


@contextmanager
def _asking(what: str, text: str) -> Iterator[None]:
    """Turn the hub's errors into FileNotFoundError with a remedy."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        yield
    except GatedRepoError:
        why = "the repository is gated: accept its terms on its page, then log in with 'hf auth login'"
    except RepositoryNotFoundError:
        why = "the hub has no such repository, or it is private and you are not logged in"
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        why = f"the hub could not be asked: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    else:
        return
    raise FileNotFoundError(f"{what}: {text} is no folder here, and as a repository of the Hugging Face hub: {why}. Give a folder, or mend that.")
