"""The state of a run of tuning: where it is, and what a resumed one needs.

Layer 4: `tuning.py` goes through its steps.
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
    """The state of a run that a resumed one needs: all but the frozen weights. steps_of: its parts, one after another."""

    steps_of: dict[Part, int]
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    generator: torch.Generator
    step: int = 0
    loss: float = 1.0
    drawn: Tensor = field(init=False)  # the generator's state when the last finished step ended
    is_torn: bool = False  # whether a step is changing the weights just now
    lessons: Lessons | None = None

    def __post_init__(self) -> None:
        self.drawn = self.generator.get_state()

    @property
    def steps(self) -> int:
        return sum(self.steps_of.values())

    @property
    def position(self) -> tuple[Part, int]:
        """The part that the next step is of, and its number in that part."""
        step = self.step
        for part, steps in self.steps_of.items():
            if step < steps:
                return part, step
            step -= steps
        raise AssertionError("no step is left")

    def save(self, path: Path, fingerprint: str) -> None:
        """Keep the state that the last finished step left; between weights old and new, what was kept before stands."""
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
        """Take up the run that `path` holds, if it is this one; a torn file is passed over, and with `force` another run's state.

        Raises: OutputExists.
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
    """Hold a checkpoint's name against other runs, which would keep their state in the same file.

    Raises: PoseCrafterError while another run has it, or where nothing can be written.
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
            if is_held:  # else it may be another's
                with suppress(OSError):  # what was tuned is not lost for it
                    lock.unlink()
