"""Safetensors files of our own making are the library's, byte for byte."""

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save

from deltalab.core.tensors import DTYPES, read_tensors, write_tensors


def some():
    """Every dtype, several shapes, keys that JSON escapes and keys beyond ASCII."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7,), (), (0, 4), (2, 1, 3)]
    return {
        f'layer.{i % 3}."{name}\\\n é.{shape}': (9 * torch.rand(shape, generator=generator)).to(dtype)
        for i, (name, dtype) in enumerate(DTYPES.items())
        for shape in shapes
    }


@pytest.mark.parametrize("tensors", [some(), dict(reversed(some().items())), {}], ids=["all", "reversed", "none"])
def test_bytes_are_those_of_the_library(tmp_path, tensors):
    write_tensors(tmp_path / "file", tensors, {"format": "pt"})
    assert (tmp_path / "file").read_bytes() == save(tensors, {"format": "pt"})


def test_reads_what_the_library_reads(tmp_path):
    (tmp_path / "file").write_bytes(save(some(), {"format": "pt"}))
    got, want = read_tensors(tmp_path / "file"), load_file(tmp_path / "file")
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].dtype == want[key].dtype
        assert torch.equal(got[key], want[key]), key


def test_writing_to_what_was_read_does_not_reach_the_file(tmp_path):
    write_tensors(tmp_path / "file", {"a": torch.arange(4.0)}, {})
    content = (tmp_path / "file").read_bytes()
    read_tensors(tmp_path / "file")["a"].zero_()
    assert (tmp_path / "file").read_bytes() == content


def test_a_tensor_at_an_odd_place_is_read_by_the_library(tmp_path):
    header = (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}'
    )
    body = b"\x07" + torch.tensor([1.5]).numpy().tobytes()
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header + body)
    got = read_tensors(tmp_path / "file")
    assert (got["a"].item(), got["b"].item()) == (7, 1.5)


@pytest.mark.parametrize("cut", [0, 4, 60, -1])
def test_a_file_that_is_cut_off_is_damaged(tmp_path, cut):
    (tmp_path / "file").write_bytes(save(some(), {"format": "pt"})[:cut])
    with pytest.raises(safetensors.SafetensorError):
        read_tensors(tmp_path / "file")
