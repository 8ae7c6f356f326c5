"""Pickled weights to safetensors, and pickles that are something else."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from jobs import convert


class Malicious:
    """Runs a command when it is unpickled by someone who lets it."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.mark}",)


def weights() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {"a.weight": torch.randn(3, 5, generator=g), "a.bias": torch.randn(3, generator=g).bfloat16(), "steps": torch.tensor(7)}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in expected.items())


@pytest.mark.parametrize("part", ["", "ema", "model", "state_dict"])
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_found_flat_or_under_the_names_that_scripts_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, zipped: bool
) -> None:
    tensors = weights()
    # As facebookresearch/DiT's training script saves it: averages, weights, moments, and the script's arguments.
    other = {"opt": {"state": {0: {"step": torch.tensor(1.0)}}}, "args": argparse.Namespace(model="DiT-XL/2", lr=1e-4)}
    if part == "ema":
        other["model"] = {"a.weight": torch.zeros(3, 5)}
    elif part:
        other["ema"] = {}  # of a script that kept no averages
    torch.save({part: tensors, **other} if part else tensors, tmp_path / "in.pt", _use_new_zipfile_serialization=zipped)
    assert convert.main([str(tmp_path / "in.pt"), str(tmp_path / "out.safetensors")]) == 0
    assert same(load_file(tmp_path / "out.safetensors"), tensors)
    assert (tmp_path / "out.safetensors").stat().st_mode == (tmp_path / "in.pt").stat().st_mode  # whoever may read the one may read the other
    assert sorted(os.listdir(tmp_path)) == ["in.pt", "out.safetensors"]
    said = capsys.readouterr().out
    assert "3 tensors" in said
    assert "19 values" in said
    assert (f"of '{part}'" in said) == bool(part)


def test_numpy_numbers_beside_the_weights_are_plain_data(tmp_path: Path) -> None:
    beside = {"best_fid": np.float64(9.62), "step": np.int64(7), "loss": np.float32(0.5), "done": np.bool_(True)}
    torch.save({"model": weights(), **beside}, tmp_path / "in.pt")
    assert same(convert.read(str(tmp_path / "in.pt"))[1], weights())
    # The names that NumPy 1 wrote: in a file that is not zipped they can be changed in place, as lines of text.
    torch.save({"model": weights(), **beside}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    written = (tmp_path / "old.pt").read_bytes()
    assert b"cnumpy._core.multiarray\n" in written
    (tmp_path / "old.pt").write_bytes(written.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert same(convert.read(str(tmp_path / "old.pt"))[1], weights())


def test_the_wrapper_of_several_processes_is_taken_off(tmp_path: Path) -> None:
    torch.save({f"module.{name}": tensor for name, tensor in weights().items()}, tmp_path / "in.pt")
    assert same(convert.read(str(tmp_path / "in.pt"))[1], weights())
    torch.save({**weights(), "module.a": torch.zeros(2)}, tmp_path / "in.pt")  # then it is a name like others
    assert "module.a" in convert.read(str(tmp_path / "in.pt"))[1]


def test_tensors_that_share_memory_are_written_each_for_itself(tmp_path: Path) -> None:
    table = torch.randn(6, 4)
    tensors = {"tied": table, "tied too": table, "row": table[2], "turned": table.T, "half": table[:3]}
    torch.save(tensors, tmp_path / "in.pt")
    assert convert.main([str(tmp_path / "in.pt"), str(tmp_path / "out.safetensors")]) == 0
    assert same(load_file(tmp_path / "out.safetensors"), tensors)


@pytest.mark.parametrize("how", ["zip", "legacy", "plain pickle"])
def test_a_malicious_pickle_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str) -> None:
    mark, source = tmp_path / "it-ran", tmp_path / "in.pt"
    content = {"model": weights(), "more": Malicious(mark)}
    if how == "plain pickle":
        source.write_bytes(pickle.dumps(content["more"]))
    else:
        torch.save(content, source, _use_new_zipfile_serialization=how == "zip")
    assert convert.main([str(source), str(tmp_path / "out.safetensors")]) == 2
    assert os.listdir(tmp_path) == ["in.pt"]
    said = capsys.readouterr().err
    assert "in.pt is refused" in said
    assert "posix.system" in said or how == "plain pickle"
    # The mark would have been made: whoever reads it without that care runs it.
    if how != "plain pickle":
        torch.load(source, weights_only=False)
    else:
        pickle.loads(source.read_bytes())
    assert mark.exists()


def test_what_is_no_weights_is_refused_with_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(content: object, match: str, target: str = "out.safetensors") -> None:
        if isinstance(content, bytes):
            (tmp_path / "in.pt").write_bytes(content)
        elif content is not None:
            torch.save(content, tmp_path / "in.pt")
        before = sorted(os.listdir(tmp_path))
        assert convert.main([str(tmp_path / "in.pt"), str(tmp_path / target)]) == 2
        assert match in capsys.readouterr().err
        assert sorted(os.listdir(tmp_path)) == before

    refused(None, "No such file")
    refused([torch.zeros(1)], "holds list, not tensors by name, nor has it any of ema, model, state_dict")
    refused({}, "holds dict, not tensors by name")
    refused({"a": torch.zeros(1), "epoch": 3}, "other things than tensors by name: 'epoch' (int)")
    refused({"model": {"a": [torch.zeros(1)]}}, "in.pt, model holds other things than tensors by name: 'a' (list)")
    refused(nn.Linear(2, 2), "in.pt is refused: it asks for torch.nn.modules.linear.Linear")
    torch.save(weights(), tmp_path / "whole.pt")
    refused((tmp_path / "whole.pt").read_bytes()[:-200], "in.pt is")
    refused(b"", "in.pt is")
    refused(weights(), "must end with .safetensors", "out.bin")
    (tmp_path / "out.safetensors").write_bytes(b"precious")
    refused(weights(), "exists already")
    assert (tmp_path / "out.safetensors").read_bytes() == b"precious"
