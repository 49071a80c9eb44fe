"""The state of a tuning run: its position, and what is needed to resume it.

Layer 4: `tuning.py` performs its steps.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from posecrafter_rt.atomic import atomic_path, writing
from posecrafter_rt.errors import OutputExists, PoseCrafterError
from posecrafter_rt.locks import alone_at
from posecrafter_rt.tuning_losses import Lessons

Part = Literal["denoiser", "decoder", "small decoder"]


@dataclass
class TuningRun:
    """The state needed to resume a run: everything but the frozen weights. steps_of: its parts, in order."""

    steps_of: dict[Part, int]
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    generator: torch.Generator
    step: int = 0
    loss: float = 1.0
    drawn: Tensor = field(init=False)  # the generator's state when the last finished step ended
    is_torn: bool = False  # whether a step is just changing the weights
    lessons: Lessons | None = None

    def __post_init__(self) -> None:
        self.drawn = self.generator.get_state()

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

    def save(self, path: Path, fingerprint: str) -> None:
        """Write the state after the last finished step; do nothing if a step was interrupted while changing weights."""
        if self.is_torn:
            return
        state = {
            "fingerprint": fingerprint, "step": self.step, "loss": self.loss, "generator": self.drawn,
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "parameters": {name: parameter.detach() for name, parameter in self.parameters.items()},
        }  # fmt: skip
        with atomic_path(path) as temporary:
            torch.save(state, temporary)

    def restore(self, path: Path, fingerprint: str, force: bool) -> None:
        """Continue the run whose state is in `path`, if it is this run. A missing or damaged file is ignored.

        Raises: OutputExists if the state is of another run; with `force` that is ignored, too.
        """
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            is_other = state["fingerprint"] != fingerprint
        except (OSError, RuntimeError, EOFError, ValueError, TypeError, LookupError, pickle.UnpicklingError):
            return
        if is_other and not force:
            raise OutputExists(f"{path} holds an unfinished tuning on other frames, or with other options",
                               "give the same ones to finish it, or --force to throw it away")  # fmt: skip
        if is_other:
            return
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["generator"])
        self.drawn = state["generator"]
        self.step, self.loss = state["step"], state["loss"]


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
