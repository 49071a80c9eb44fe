"""The exception tree: what is wrong (with the value seen) and what to do about it; and a library's error in one line.

Layer 0: imports nothing of the package.
"""

from __future__ import annotations

import re

# How libraries say that memory ran out where they raise no error of its own kind: torch, OpenVINO, OpenCV, the CUDA driver,
# cuBLAS, cuDNN; and those that do not give their reason: oneDNN, which says the same when it has no memory for its code or its
# scratchpad, torch, for which cuDNN found no way to convolve: each that it knows may need more memory than there is; and
# Python, which found no room for a thread's stack.
OUT_OF_MEMORY = re.compile(
    r"can'?t allocate memory|cannot allocate memory(?! in static TLS)|(not enough|insufficient|out of) memory|bad.alloc"
    r"|could not (create|execute) a primitive$|CU\w+_STATUS_\w*ALLOC\w*_FAILED"
    r"|unable to find (an engine to execute|a valid cudnn algorithm)|^can't start new thread$",
    re.I | re.M,
)


class PoseCrafterError(Exception):
    """Base of every error that a user can cause or mend.

    Args:
        message: what is wrong, naming the value seen.
        hint: what to do next; a command where one mends it.
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
    """A file that the user made would be overwritten; needs `--force`."""


class OutOfMemory(PoseCrafterError):
    """Memory, of the machine or of the GPU, did not suffice; what was finished before is kept."""


class NotFinite(PoseCrafterError):
    """Numbers of a network left the range of the type that it runs in, or were never numbers."""


class DiskFull(PoseCrafterError):
    """A write failed for lack of space; nothing half-written is left behind."""


def last_line(error: BaseException) -> str:
    """What an error says at last, or its kind where it says nothing: libraries name their source files before."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def out_of_memory(error: Exception, hint: str) -> OutOfMemory | None:
    """What Python, torch or another library raised because memory ran out, in one line; None for any other error."""
    if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
        return None
    reason = (str(error).splitlines() or [""])[0]
    return OutOfMemory(f"memory ran out{reason and ': '}{reason}", hint)
