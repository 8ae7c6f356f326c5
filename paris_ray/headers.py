"""Headers of safetensors files: which tensors a file holds, read without the weights, and whether they are a network's. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

Shape = tuple[int, ...]
Header = dict[str, tuple[Shape, str]]
"""Shape and type of each tensor, as in ``{"pos_embed": ((1, 256, 1152), "F32")}``."""

FLOATS = {"F64", "F32", "F16", "BF16"}


def read_header(path: str, where: str | None = None) -> Header:
    """The header of a local safetensors file.

    Args:
        path: of the file.
        where: what messages call it, if not by its path.

    Raises:
        ValueError: the file is not whole.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            names = file.keys()
            pieces = {name: file.get_slice(name) for name in names}
            return {name: (tuple(piece.get_shape()), str(piece.get_dtype())) for name, piece in pieces.items()}
    except SafetensorError as error:
        raise ValueError(f"{where or path} is not a whole safetensors file ({error}); copy it again") from error


def check_header(where: str, header: Header, wanted: Mapping[str, Shape], ignore: Collection[str] = ()) -> None:
    """See that a file holds every tensor of a network with its shape, and none besides.

    Args:
        where: the file, for messages.
        header: what it holds.
        wanted: the network's tensors.
        ignore: names of tensors that the file may hold besides.

    Raises:
        ValueError: names the tensors that do not fit.
    """
    problems = [f"tensor {name} {shape} is missing from the file" for name, shape in wanted.items() if name not in header]
    problems += [f"tensor {name} is in the file but not in the network" for name in sorted(header.keys() - wanted.keys() - set(ignore))]
    for name in (name for name in wanted if name in header):
        shape, kind = header[name]
        if shape != wanted[name]:
            problems.append(f"tensor {name} has shape {shape} in the file, {wanted[name]} in the network")
        elif kind not in FLOATS:
            problems.append(f"tensor {name} is of type {kind}; allowed are {', '.join(sorted(FLOATS))}")
    if problems:
        raise ValueError(does_not_fit(where, problems))


def check_layers(where: str, header: Header, layers: int) -> None:
    """Raise ValueError for more layers than a file has tensors: before they are listed or made, which takes memory and time for each."""
    if not 0 <= layers <= len(header):
        raise ValueError(does_not_fit(where, [f"there are {len(header)} tensors in the file, {layers} layers in the network"]))


def does_not_fit(where: str, problems: Sequence[str]) -> str:
    """The message for a file of weights that is not the network's."""
    shown = "".join(f"\n  - {problem}" for problem in problems[:10])
    more = f"\n  … and {len(problems) - 10} more" if len(problems) > 10 else ""
    return f"{where} does not fit the config.json beside it:{shown}{more}\nUse the weights and the config.json of one and the same network."
