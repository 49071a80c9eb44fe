"""The package's exceptions, which say what is wrong (with the value seen) and what to do, and helpers for other errors.

Layer 0: imports nothing of the package.
"""

from __future__ import annotations

import re

# What libraries say when memory ran out but they raise no error type for it: torch, OpenVINO, OpenCV, TensorRT, the
# CUDA driver, cuBLAS, cuDNN. Three do not name memory as the reason: oneDNN, when it has no memory for its code or its
# scratchpad; torch, when cuDNN finds no convolution algorithm, because each may need more memory than there is; and
# Python, when there is no room for a thread's stack.
_OUT_OF_MEMORY = re.compile(
    r"can'?t allocate memory|cannot allocate memory(?! in static TLS)|(not enough|insufficient) memory|out ?of ?memory"
    r"|bad.?alloc|could not (create|execute) a primitive$|CU\w+_STATUS_\w*ALLOC\w*_FAILED|cudaErrorMemoryAllocation"
    r"|unable to find (an engine to execute|a valid cudnn algorithm)|^can't start new thread$",
    re.I | re.M,
)


class PoseCrafterError(Exception):
    """Base class of every error that a user can cause or fix.

    Args:
        message: what is wrong, naming the value seen.
        hint: what to do next; a command if one fixes it.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ShapeError(PoseCrafterError, ValueError):
    """Tensors or arrays whose shapes or dtypes do not fit together."""


class PoseError(PoseCrafterError, ValueError):
    """Keypoints that cannot be read, are not finite, or do not describe a pose."""


class VideoError(PoseCrafterError):
    """A video or image that cannot be read or written."""


class CheckpointError(PoseCrafterError):
    """A tuned checkpoint or weight file that cannot be used."""


class ModelError(PoseCrafterError):
    """A base model, ControlNet or VAE that cannot be found or loaded."""


class EngineFolderError(PoseCrafterError):
    """An engine folder that is incomplete, altered, or built for something else."""


class BackendUnavailable(PoseCrafterError):
    """An explicitly requested backend, device or optional dependency that cannot run here."""


class OutputExists(PoseCrafterError):
    """The output would overwrite or mix with something that may be the user's; in most cases `--force` allows it."""


class OutOfMemory(PoseCrafterError):
    """The machine or the GPU ran out of memory; what was finished before is kept."""


class NotFinite(PoseCrafterError):
    """A network's output is not finite: its numbers overflowed the type that it runs in, or were NaN before."""


class DiskFull(PoseCrafterError):
    """A write failed for lack of space; nothing half-written is left behind."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none, cut so that it fits into one of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def last_line(error: BaseException) -> str:
    """Return the last line of an error's message, or its type if it has none: libraries name source files first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def is_out_of_memory(error: BaseException | str) -> bool:
    """Return whether an error, or what a library says of one, means that memory ran out."""
    return isinstance(error, (MemoryError, OutOfMemory)) or bool(_OUT_OF_MEMORY.search(str(error)))


def out_of_memory(error: Exception, hint: str) -> OutOfMemory | None:
    """Return an OutOfMemory with the first line of an error that means "out of memory"; None for any other error."""
    if not is_out_of_memory(error):
        return None
    reason = (str(error).splitlines() or [""])[0]
    return OutOfMemory(f"memory ran out{reason and ': '}{reason}", hint)
