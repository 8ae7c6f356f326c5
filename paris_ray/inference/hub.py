"""Where a model's folder is: on disk, in an object store, or in a repository of the Hugging Face hub. Imports no torch."""

from __future__ import annotations

import os
import re

from paris_ray.storage import Folder

FILES = ("*.safetensors", "*.json", "*.txt", "README.md")
"""What is fetched of a repository: weights as safetensors, configs, tokenizer files, the card. Nothing that is code or pickled."""


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
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    repository, revision = match[1], match[2]
    try:
        return Folder(snapshot_download(repository, revision=revision, allow_patterns=list(FILES)))
    except GatedRepoError:
        why = "the repository is gated: accept its terms on its page, then log in with 'hf auth login'"
    except RepositoryNotFoundError:
        why = "the hub has no such repository, or it is private and you are not logged in"
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        why = f"the hub could not be asked: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    raise FileNotFoundError(f"model: {text} is no folder here, and as a repository of the Hugging Face hub: {why}. Give a folder, or mend that.")
