"""Keep what a program has set in torch away from the networks: it would change what they compute, or where.

Layer 4: for the backends that compute with torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch

# Held while a network runs with other settings than the program's: torch's are those of the whole process.
_lock = Lock()
Setting = tuple[Any, str, tuple[Any, ...]]  # what has it, its name, and the values that will do


@contextmanager
def own_settings(device: torch.device, is_exact: bool) -> Iterator[None]:
    """In the block, compute on a device as if the program had set nothing.

    Autocast is off. Float32 is multiplied exactly, but for a GPU's convolutions, which are in TF32 unless `is_exact`. A GPU
    is current, and cuDNN is used, but does not choose its algorithms by timing them.
    """
    settings, is_gpu = own_values(device.type, is_exact), device.type == "cuda"
    with torch.autocast(device.type, enabled=False):
        with _lock:  # what another thread has set for its network is not the program's
            is_set = all(getattr(holder, name) in values for holder, name, values in settings)
        if is_set and not is_gpu:  # then networks of several threads run at once
            yield
            return
        with _lock, torch.cuda.device(device) if is_gpu else nullcontext(), changed(settings):
            yield


def own_values(device_type: str, is_exact: bool) -> list[Setting]:
    """Return the settings that `own_settings` looks after."""
    backends: Any = torch.backends  # what there is depends on torch's version
    cudnn, cuda, mkldnn = backends.cudnn, backends.cuda, backends.mkldnn
    gpu: list[Setting] = [(cudnn, "enabled", (True,)), (cudnn, "benchmark", (False,))]
    if not hasattr(cudnn, "conv"):  # torch before 2.9; a later one may refuse to read these settings
        matmul: Setting = (_Products(), "precision", ("highest",))
        return [*gpu, (cudnn, "allow_tf32", (not is_exact,)), matmul] if device_type == "cuda" else [matmul]
    exact = ("ieee", "none")  # none: that of `torch.backends`, which then has none either
    if device_type != "cuda":
        return [(holder, "fp32_precision", exact) for holder in (mkldnn.conv, mkldnn.matmul)]
    return [
        *gpu,
        (cudnn.conv, "fp32_precision", exact if is_exact else ("tf32",)),
        (cuda.matmul, "fp32_precision", exact),
    ]


class _Products:
    """How exactly torch before 2.9 multiplies float32, on any device. `allow_tf32` cannot tell two of its values apart."""

    @property
    def precision(self) -> str:
        return torch.get_float32_matmul_precision()

    @precision.setter
    def precision(self, value: str) -> None:
        torch.set_float32_matmul_precision(value)


@contextmanager
def changed(settings: Sequence[Setting]) -> Iterator[None]:
    """Change what has none of its values, for the block. To set torch's defaults, too, would make them follow nothing."""
    with ExitStack() as restored:
        for holder, name, values in settings:
            before = getattr(holder, name)
            if before not in values:
                setattr(holder, name, values[0])
                restored.callback(setattr, holder, name, before)
        yield
