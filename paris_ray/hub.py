"""Where weights are: on disk, in an object store, or in a repository of the Hugging Face hub. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from paris_ray.storage import Folder, safetensors_at

FILES = ("*.safetensors", "*.json", "*.txt", "README.md")
"""What is fetched of a model's repository: weights as safetensors, configs, tokenizer files, the card. Nothing that is code or pickled."""

Weights = tuple[Folder, list[str]]
"""A folder, and the names of the safetensors files in it that are meant."""


def open_model(path: str | os.PathLike[str]) -> Folder:
    """The folder of a model.

    Args:
        path: a local folder, a URI, or ``owner/name`` of the hub, with ``@revision`` if not its main one; a folder of that name goes first. What
            was fetched stays in the hub's cache, and is found there without a network.

    Raises:
        FileNotFoundError: neither a folder nor a repository that can be reached; the message says what to do.
    """
    text = os.fspath(path)
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", text)
    folder = Folder(text)
    if match is None or folder.exists():
        return folder
    from huggingface_hub import snapshot_download

    with _asking("model", text):
        return Folder(snapshot_download(match[1], revision=match[2], allow_patterns=list(FILES)))


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
