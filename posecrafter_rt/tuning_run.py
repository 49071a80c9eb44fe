"""The state of a tuning run: its position, and what is needed to resume it.

Layer 4: `tuning.py` performs its steps.
"""

from __future__ import annotations

import logging
import pickle
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from posecrafter_rt.atomic import atomic_path, writing
from posecrafter_rt.errors import CheckpointError, OutputExists, PoseCrafterError, first_line, out_of_memory
from posecrafter_rt.locks import alone_at
from posecrafter_rt.tuning_losses import Lessons

Part = Literal["denoiser", "decoder", "small decoder"]
# What a run starts from that an option of the same name gives.
_OPTIONS = ("prompt", "norm_scope", "seed", "precision", "learning_rate",
            "steps", "decoder_steps", "small_decoder_steps")  # fmt: skip

log = logging.getLogger(__name__)


@dataclass
class TuningRun:
    """The state needed to resume a run: everything but the frozen weights. steps_of: its parts, in order."""

    steps_of: dict[Part, int]
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    device: str
    precision: str  # of the activations
    scaler: torch.amp.GradScaler = field(init=False)
    step: int = 0
    loss: float = 1.0
    drawn: Tensor = field(init=False)  # the generator's state when the last finished step ended
    is_torn: bool = False  # whether a step is just changing the weights
    lessons: Lessons | None = None

    def __post_init__(self) -> None:
        self.drawn = self.generator.get_state()
        self._take(self.precision)

    def _take(self, precision: str) -> None:
        self.precision = precision
        self.scaler = torch.amp.GradScaler(self.device, enabled=precision == "fp16")

    @property
    def steps(self) -> int:
        return sum(self.steps_of.values())

    @property
    def position(self) -> tuple[Part, int]:
        """The part that the next step belongs to, and the step's number in that part, from 0."""
        step = self.step
        for part, steps in self.steps_of.items():
            if step < steps:
                return part, step
            step -= steps
        raise AssertionError("no step is left")

    def save(self, path: Path, start: dict[str, Any]) -> None:
        """Write the state after the last finished step; do nothing if a step was interrupted while changing weights.

        start: see `restore`.
        """
        if self.is_torn:
            return
        state = {
            "start": {**start, "precision": self.precision}, "step": self.step, "loss": self.loss,
            "generator": self.drawn, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "parameters": {name: parameter.detach() for name, parameter in self.parameters.items()},
        }  # fmt: skip
        with atomic_path(path) as temporary:
            torch.save(state, temporary)

    def restore(self, path: Path, start: dict[str, Any], any_precision: bool, force: bool) -> None:
        """Continue the run whose state is in `path`, if it is this run. A missing or damaged file is ignored.

        Args: start: what the run starts from but its precision, JSON values by what people call them. any_precision:
            whether it may continue in another precision than this run's, the one in which it began.
        Raises: OutputExists if the state is of another run; with `force` that is ignored, too. CheckpointError if the
            file cannot be read; OutOfMemory.
        """
        state = _load(path)
        if state is None:
            return
        kept = state["start"]
        start = {**start, "precision": kept.get("precision", self.precision) if any_precision else self.precision}
        if kept != start:
            if force:
                return
            raise _of_another_run(path, kept, start)
        if kept["precision"] != self.precision:
            log.warning("%s began in %s, so it goes on in that; --no-resume begins anew in %s",
                        path, kept["precision"], self.precision)  # fmt: skip
        self._take(kept["precision"])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["generator"])
        self.drawn = state["generator"]
        self.step, self.loss = state["step"], state["loss"]


def _load(path: Path) -> dict[str, Any] | None:
    """Return the state in a file; None if there is none, or if it is damaged. Raises: see `TuningRun.restore`."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if "fingerprint" in state:
            state["start"] = {}  # an earlier version wrote it, and can finish it
        _ = state["start"]  # a file of anything else has none
        return state
    except FileNotFoundError:
        return None
    except OSError as error:  # it may hold hours of tuning, so nothing may replace it
        raise CheckpointError(f"{path}, an unfinished tuning, cannot be read: {error.strerror or error}",
                              "run the same command once it can be, or start over: --no-resume") from error  # fmt: skip
    except (MemoryError, RuntimeError, EOFError, ValueError, TypeError, LookupError, pickle.UnpicklingError) as error:
        known = out_of_memory(error, "free some memory and run the same command again")
        if known is not None:
            raise known from error
        log.warning("%s is damaged, so tuning starts over: %s", path, first_line(error))
        return None


def _of_another_run(path: Path, kept: dict[str, Any], start: dict[str, Any]) -> OutputExists:
    """Return the error that says in what the run in `path` differs and, if options tell it all, which finish it."""
    names = [name for name, value in start.items() if kept.get(name, value) != value]
    if "small_decoder_steps" in names and "small_decoder" in names:
        names.remove("small_decoder")  # it follows from them
    given = [f"--{name.replace('_', '-')} {shlex.quote(str(kept[name]))}" for name in names if name in _OPTIONS]
    if not names:
        return OutputExists(f"{path} holds an unfinished tuning of another version of this package",
                            "finish it with that version, or give --force to throw it away")  # fmt: skip
    differing = ", ".join(name.replace("_", " ") for name in names)
    same = " ".join(given) if given and len(given) == len(names) else "the same"
    return OutputExists(f"{path} holds an unfinished tuning that differs in {differing}",
                        f"give {same} to finish it, or --force to throw it away")  # fmt: skip


@contextmanager
def tuning_alone(output: Path) -> Iterator[None]:
    """Lock a checkpoint's name against other runs, which would keep their state in the same file.

    Raises: PoseCrafterError if another run holds it, or if the folder cannot be written.
    """
    lock = output.with_name(f".{output.name}.lock")
    with ExitStack() as held:
        try:
            with writing(output):
                output.parent.mkdir(parents=True, exist_ok=True)
                is_held = held.enter_context(alone_at(lock, lock.touch))
        except BlockingIOError as error:
            raise PoseCrafterError(f"another process is tuning {output}",
                                   "wait for it, or choose another name for the output") from error  # fmt: skip
        try:
            yield
        finally:
            if is_held:  # else another run may be using the file
                with suppress(OSError):  # the tuned result must not be lost for this
                    lock.unlink()
