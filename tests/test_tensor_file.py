"""Tensors to a file and back by safetensors' own readers; the file that was there is the file that is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from posecrafter_rt.atomic import atomic_path, sha256_file
from posecrafter_rt.tensor_file import DTYPES, MappedTensors, save_tensors


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{dtype}": torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "transposed": torch.rand(3, 4).T,
                "a part of another": torch.rand(9)[2:5], "gradient": torch.ones(2, requires_grad=True)}  # fmt: skip
    save_tensors(tensors, tmp_path / "a", {"said": "größer", "b": ""})
    read = load_file(tmp_path / "a")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == {"said": "größer", "b": ""}
    save_tensors(dict(reversed(tensors.items())), tmp_path / "b", {"b": "", "said": "größer"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_nothing_is_a_file_too(tmp_path: Path) -> None:
    save_tensors({}, tmp_path / "a")
    assert load_file(tmp_path / "a") == {}


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_the_file_is_the_one_that_was_there(tmp_path: Path) -> None:
    """Others may read what the umask lets them, and the lock on the temporary file holds to the end."""
    with atomic_path(tmp_path / "a") as temporary:
        inode = temporary.stat().st_ino
        save_tensors({"x": torch.ones(3)}, temporary)
        assert [path.stat().st_ino for path in tmp_path.iterdir()] == [inode]
    os.umask(umask := os.umask(0))
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask


def test_what_is_mapped_is_what_was_written_and_may_be_released(tmp_path: Path) -> None:
    tensors = {"a": torch.rand(3, 700), "empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5)}
    save_tensors(tensors, tmp_path / "a", {"said": "größer"})
    mapped = MappedTensors(tmp_path / "a")
    assert mapped.digest == sha256_file(tmp_path / "a")
    for _ in range(2):
        assert mapped.arrays.keys() == tensors.keys()
        assert all(torch.equal(torch.from_numpy(mapped.arrays[name]), tensor) for name, tensor in tensors.items())
        mapped.release()
    save_tensors({}, tmp_path / "b")
    assert MappedTensors(tmp_path / "b").arrays == {}


@pytest.mark.parametrize("content", [b"", b"torch", b"\0" * 8 + b"{}"])
def test_what_is_no_such_file_is_not_mapped(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError):
        MappedTensors(tmp_path / "a")
