"""Write safetensors files in place, and map them.

Layer 0: imports `mapped_file` only. safetensors' own `save_file` writes a file beside the path and renames it. That
file is readable by its owner only, whatever the umask, and is not the one that `atomic.atomic_path` locks and removes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from posecrafter_rt.mapped_file import MappedFile

# The format's names: https://github.com/huggingface/safetensors#format
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 8  # bytes, of the data's start; wide types come first, so every tensor is aligned


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors from any device, and text metadata, as a safetensors file; equal content gives equal bytes.

    Raises: OSError, such as for a full disk; KeyError for a dtype that is not in DTYPES.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for name in names:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


class MappedTensors(MappedFile):
    """A memory-mapped file that `save_tensors` wrote of float32 tensors. arrays: by the tensors' names.

    Raises: OSError; ValueError for an empty file or another format.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        start = 8 + int.from_bytes(self.content[:8].tobytes(), "little")
        header, data = json.loads(self.content[8:start].tobytes()), self.content[start:]
        self.arrays = {name: data[slice(*said["data_offsets"])].view(np.float32).reshape(said["shape"])
                       for name, said in header.items() if name != "__metadata__"}  # fmt: skip

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the file."""
        digest = hashlib.sha256(self.content.data).hexdigest()
        self.release()
        return digest
