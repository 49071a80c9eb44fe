"""What building and running TensorRT's plans share: its logger, reasons for failures, element types.

Layer 4.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from posecrafter_rt.errors import OutOfMemory, PoseCrafterError, is_out_of_memory

if TYPE_CHECKING:
    import tensorrt as trt

FREE_MEMORY = "free some of the GPU's memory, or build the engine with a smaller --max-frames or --size"
DEBUG = "run again with --debug"
CHECK_DRIVER = "update the NVIDIA driver if it is older than this TensorRT, or use --backend torch"

Made = TypeVar("Made")

log = logging.getLogger(__name__)

# What `failure` reports: the last errors that TensorRT logged, and notes, which these never push out.
_errors: deque[str] = deque(maxlen=4)
_notes: list[str] = []
_warnings: deque[str] = deque(maxlen=1)  # the last one: some versions only warn that CUDA cannot be used


@cache
def make_logger() -> trt.ILogger:
    """Return a logger of TensorRT's messages into this package's log; one per process: TensorRT accepts no second."""
    import tensorrt as trt

    severities = trt.ILogger.Severity
    levels = {severities.INTERNAL_ERROR: logging.ERROR, severities.ERROR: logging.ERROR,
              severities.WARNING: logging.WARNING, severities.INFO: logging.DEBUG}  # fmt: skip

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity)
            if level is None:  # VERBOSE: thousands of lines
                return
            if level == logging.ERROR:
                _errors.append(message)
            elif level == logging.WARNING:
                _warnings.append(message)
            log.log(level, "TensorRT: %s", message)

    return Logger()


def start(make: Callable[[], Made]) -> Made:
    """Make one of TensorRT's `Builder`, `Runtime` and `Refitter`.

    Raises: PoseCrafterError with what TensorRT logged if there is none, as where the driver is too old for it.
    """
    _warnings.clear()
    try:
        return make()
    except TypeError as error:  # pybind11's for a null pointer; one for wrong arguments says something else
        if "nullptr" not in str(error):
            raise
        reasons = [*_warnings, *take_errors()]
        raise explain("TensorRT does not start", reasons, CHECK_DRIVER, PoseCrafterError) from error


def note_error(message: str) -> None:
    """Keep a reason that `failure` reports rather than what TensorRT logs before and after it."""
    _notes.append(message)


def failure(what: str, hint: str = DEBUG, kind: type[PoseCrafterError] = PoseCrafterError) -> PoseCrafterError:
    """Return what to raise if TensorRT only says that something failed: its reason is in what it logged last.

    Returns: OutOfMemory if memory is the reason, else a `kind` with `hint`.
    """
    return explain(what, take_errors(), hint, kind)


def take_errors() -> list[str]:
    """Return and forget the last few errors that TensorRT logged since the last call, then what was noted.

    A build that succeeds may have logged some, too.
    """
    errors = [*_errors, *_notes]
    _errors.clear()
    _notes.clear()
    return errors


def explain(what: str, errors: Sequence[str], hint: str, kind: type[PoseCrafterError]) -> PoseCrafterError:
    """Return `failure`'s error with one of these reasons: a lack of memory if there is one, else the last."""
    for error in errors:
        if is_out_of_memory(error):
            return OutOfMemory(f"{what}: {_first_line(error)}", FREE_MEMORY)
    return kind(f"{what}: {_first_line(errors[-1])}" if errors else what, hint)


def _first_line(message: str) -> str:
    return (message.strip().splitlines() or ["for no reason that it tells"])[0]


def leave_memory() -> None:
    """Free the memory that torch only caches: TensorRT allocates, too, and cannot use it."""
    torch.cuda.empty_cache()


def trt_dtype(dtype: torch.dtype) -> Any:
    """Return TensorRT's `DataType` for a torch type."""
    return _dtypes()[dtype]


def torch_dtype(dtype: Any) -> torch.dtype:
    """Return the torch type of a `tensorrt.DataType`."""
    return {theirs: ours for ours, theirs in _dtypes().items()}[dtype]


def _dtypes() -> dict[torch.dtype, Any]:
    import tensorrt as trt

    return {torch.float32: trt.float32, torch.float16: trt.float16, torch.bfloat16: trt.bfloat16,
            torch.int64: trt.int64, torch.bool: trt.bool}  # fmt: skip
