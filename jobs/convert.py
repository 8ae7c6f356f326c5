"""Pickled weights (.pt, .pth, .bin, .ckpt) to safetensors: the one place where a pickle is read, and nothing in it runs.

python -m jobs.convert DiT-XL-2-256x256.pt DiT-XL-2-256x256.safetensors

The file must hold tensors by name, or under 'ema', 'model' or 'state_dict' (the first of these that it has) beside anything that is plain data.
"module." before every name, of a network that trained in several processes, is taken off.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import zipfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobs import cli

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("ema", "model", "state_dict")
"""Where training scripts put a network's weights; averaged ones first, as those are what is sampled from."""

WRAPPER = "module."
"""What torch's DistributedDataParallel puts before every name; taken off."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN.pt", help="local file that torch.save wrote")
    parser.add_argument("target", metavar="OUT.safetensors", help="local file to write; must not exist")
    args = parser.parse_args(argv)
    try:
        if not args.target.endswith(".safetensors"):
            raise ValueError(f"{args.target} must end with .safetensors, by which loaders know it")
        if os.path.exists(args.target):
            raise ValueError(f"{args.target} exists already; remove it, or name another file")
        part, tensors = read(args.source)
        write(tensors, args.target)
    except (ValueError, OSError) as error:
        return cli.complain(parser, error)
    values, size = sum(tensor.numel() for tensor in tensors.values()), os.path.getsize(args.target)
    where = f", of '{part}'" if part else ""
    print(f"convert: {args.target}: {len(tensors)} tensors{where}, {values:,} values, {size / 1e9:.2f} GB")
    return 0


def read(path: str) -> tuple[str, dict[str, Tensor]]:
    """The weights in a file that ``torch.save`` wrote.

    Args:
        path: of a local file; of a large one only what is used is read.

    Returns:
        the part that they were under, if any, and the tensors by name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it asks for code to be run, is no such file, or holds no tensors by name; the message says what it holds.
    """
    import pickle

    import torch

    try:
        # Plain data and tensors only; a script's arguments and NumPy's numbers, which many save beside their weights, are plain data too.
        with torch.serialization.safe_globals([argparse.Namespace, *_numpy_numbers()]):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # whatever a torn file makes the reader stumble over
        said = (str(error).splitlines() or [type(error).__name__])[0]
        if not isinstance(error, pickle.UnpicklingError):
            raise ValueError(f"{path} is not a whole file of torch.save: {said}; copy it again") from error
        asked = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it asks for {asked[1]}, which no weights need: that may be code, and is not run" if asked else said
        raise ValueError(f"{path} is refused: {why}; get the weights from where you trust them, as tensors by name") from error
    part = next((name for name in PARTS if isinstance(found, dict) and isinstance(found.get(name), dict) and found[name]), "")
    tensors = found[part] if part else found
    if not isinstance(tensors, dict) or not tensors:
        raise ValueError(f"{path} holds {type(tensors).__name__}, not tensors by name, nor has it any of {', '.join(PARTS)}")
    if strange := [f"{name!r} ({type(value).__name__})" for name, value in tensors.items() if not (isinstance(name, str) and torch.is_tensor(value))]:
        raise ValueError(f"{path}{f', {part}' if part else ''} holds other things than tensors by name: {', '.join(strange[:8])}")
    if all(name.startswith(WRAPPER) for name in tensors):
        tensors = {name.removeprefix(WRAPPER): tensor for name, tensor in tensors.items()}
    return part, tensors


def _numpy_numbers() -> list[Any]:
    """What a pickle names to rebuild a NumPy number, in NumPy 1 and 2."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?")]
    return [np.dtype, *kinds, *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]


def write(tensors: dict[str, Tensor], path: str) -> None:
    """Write a safetensors file, whole or not at all. Tensors that share memory, which that format does not know, are written each for itself."""
    from safetensors.torch import save_file

    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage()
        whole = tensor.is_contiguous() and memory.nbytes() == tensor.nbytes and memory.data_ptr() not in seen
        apart[name] = tensor.detach() if whole else tensor.detach().contiguous().clone()
        seen.add(memory.data_ptr())
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "wb") as file:
            readable = os.fstat(file.fileno()).st_mode
        save_file(apart, partial, metadata={"format": "pt"})
        os.chmod(partial, readable)  # safetensors writes for the owner alone
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


if __name__ == "__main__":
    sys.exit(main())
