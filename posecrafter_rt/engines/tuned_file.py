"""The file of an engine that holds what tuning changes, apart from the base's weights: all that a refit writes.

Layer 4: for backends whose `holds_tuned_apart` is true.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from posecrafter_rt.engines.refit import in_stored_type
from posecrafter_rt.tensor_file import save_tensors

if TYPE_CHECKING:
    from posecrafter_rt.models.loading import PoseModel

TUNED_FILE = "tuned.safetensors"  # in a networks folder


def write_tuned(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the weights of `PoseModel.tuned` that the networks have, by their names and in the types that run."""
    save_tensors(tensors, folder / TUNED_FILE)


def read_tuned(folder: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read what `write_tuned` wrote."""
    return load_file(folder / TUNED_FILE, device=str(device))


def refit_tuned(
    source: Path, folder: Path, model: PoseModel, lay_out: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> None:
    """Write into `folder` the tuned weights of `model` in place of those in `source`; see `Backend.refit`.

    Args: lay_out: brings a weight's dimensions in the order in which it is stored.
    Raises: EngineFolderError if a weight is beyond the range of the type that it is stored in.
    """
    from posecrafter_rt.models.loading import named_parameters

    parameters = dict(named_parameters(model))
    write_tuned(folder, {name: in_stored_type(name, lay_out(parameters[name]), stored.dtype)
                         for name, stored in read_tuned(source).items()})  # fmt: skip
