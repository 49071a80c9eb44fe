"""The finished parts of a render on disk, from which the same command goes on after kill -9.

Layer 5. A segment counts once state.json lists it with its hash; every file is written under a temporary name first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from posecrafter_rt.atomic import atomic_path, refuse_overwrite, sha256_file, writing
from posecrafter_rt.errors import OutputExists, PoseCrafterError
from posecrafter_rt.locks import alone_at
from posecrafter_rt.runtime.report import SegmentReport
from posecrafter_rt.runtime.segments import SegmentChoice
from posecrafter_rt.tensor_file import save_tensors
from posecrafter_rt.video_io import decode_png, encode_png

STATE = "state.json"


class PartialRender:
    """The folder of one unfinished render; see `open_partial`.

    hashes: SHA-256 of the finished segments' files, in order. staged: whether all outputs were written to the folder.
    choice: what was chosen for `segment="auto"`; every run of the same render keeps to it.
    """

    def __init__(
        self, folder: Path, fingerprint: str, hashes: list[str], staged: bool = False,
        choice: SegmentChoice | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.fingerprint, self.hashes, self.staged = folder, fingerprint, hashes, staged
        self.choice = choice

    def fix(self, choice: SegmentChoice) -> None:
        """Keep what was chosen for `segment="auto"`. Call this before the first segment is saved."""
        self.choice = choice
        self._write_state()

    def save(self, frames: Iterable[np.ndarray], carried: Tensor, report: SegmentReport) -> None:
        """Add the next segment: its frames as PNG, what it carries over to the one after, and its report.

        Raises: DiskFull; what was finished before is still there.
        """
        tensors = {f"frame{index:06d}": torch.from_numpy(encode_png(frame)) for index, frame in enumerate(frames)}
        path = self._path(len(self.hashes))
        with atomic_path(path) as temporary:
            save_tensors({**tensors, "carried": carried}, temporary,
                      metadata={"report": json.dumps(vars(report))})  # fmt: skip
        self._write_state(segments=[*self.hashes, sha256_file(path)], staged=False)

    def reports(self) -> list[SegmentReport]:
        """Return the reports of the finished segments."""
        return [SegmentReport(**json.loads(self._metadata(index)["report"])) for index in range(len(self.hashes))]

    def carried(self) -> Tensor | None:
        """Return the latents that the last finished segment carries over to the next; None if none is finished."""
        if not self.hashes:
            return None
        with safe_open(self._path(len(self.hashes) - 1), "pt") as file:
            return file.get_tensor("carried")

    def frames(self) -> Iterator[np.ndarray]:
        """Yield the frames of all finished segments, (H, W, 3) uint8, read one at a time."""
        for index in range(len(self.hashes)):
            with safe_open(self._path(index), "pt") as file:
                names = sorted(name for name in file.keys() if name != "carried")  # noqa: SIM118 - not a mapping
                for name in names:
                    yield decode_png(file.get_tensor(name).numpy())

    def holds(self, outputs: Sequence[Path]) -> bool:
        """Return whether every output is finished: in the folder, or already moved from there to its place."""
        return self.staged and all((self.folder / path.name).exists() or path.exists() for path in outputs)

    def publish(self, outputs: Sequence[Path], *, force: bool = False) -> None:
        """Move the outputs from the folder to their places and remove the folder; if interrupted, call it again.

        Raises: OutputExists if `force` is false and another program has made one meanwhile; all then stay there.
        """
        self._write_state(staged=True)
        left = [path for path in outputs if (self.folder / path.name).exists()]
        for path in left:
            refuse_overwrite(path, force)
        for path in left:
            os.replace(self.folder / path.name, path)
        self.remove()

    def remove(self) -> None:
        """Remove the folder and its files, the state last: after a kill the folder is still known as ours."""
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == STATE):
            path.unlink()
        self.folder.rmdir()

    def drop_unfinished(self) -> None:
        """Forget all segments from the first whose file is missing or changed, and remove leftovers."""
        for index, expected in enumerate(self.hashes):
            path = self._path(index)
            if not path.is_file() or sha256_file(path) != expected:
                del self.hashes[index:]
                break
        self.staged = False  # else `holds` could take an earlier render's outputs for those of this one
        kept = {STATE, *(self._path(index).name for index in range(len(self.hashes)))}
        for path in self.folder.iterdir():
            if path.name not in kept:
                path.unlink()
        self._write_state()

    def _path(self, index: int) -> Path:
        return self.folder / f"segment-{index:05d}.safetensors"

    def _metadata(self, index: int) -> dict[str, str]:
        with safe_open(self._path(index), "pt") as file:
            return file.metadata()

    def _write_state(self, **changes: Any) -> None:
        """Write the state with changes, which hold once they are on the disk: the same command goes on from there."""
        state = {"fingerprint": self.fingerprint, "segments": self.hashes, "staged": self.staged, "choice": self.choice,
                 **changes}  # fmt: skip
        with atomic_path(self.folder / STATE) as temporary:
            temporary.write_text(json.dumps(state, indent=1), encoding="utf-8")
        self.hashes, self.staged = state["segments"], state["staged"]


@contextmanager
def open_partial(
    folder: Path, fingerprint: str, outputs: Sequence[Path], *, force: bool = False
) -> Iterator[PartialRender]:
    """Begin a render, or go on with the one that `folder` holds.

    Args: fingerprint: a hash of everything that its frames depend on. outputs: the files that it is to make. force:
        throw away the finished parts of a render with another fingerprint.
    Yields: the render, its finished segments verified. If the block fails and something is finished, the folder stays.
    Raises: OutputExists if the folder belongs to another render and `force` is false, or to no render at all;
        PoseCrafterError while another process is rendering into it, or if it cannot be made, naming the first output.
    """
    with _locked(folder, outputs[0]):
        state = read_state(folder)
        partial = PartialRender(folder, fingerprint, [])
        if state is None:
            _refuse_foreign(folder)
        elif state["fingerprint"] == fingerprint:
            choice = state.get("choice")
            partial = PartialRender(folder, fingerprint, state["segments"], state["staged"],
                                    None if choice is None else SegmentChoice(*choice))  # fmt: skip
        elif not force and (state["segments"] or state["staged"]):
            raise OutputExists(f"{folder} holds an unfinished render with another engine, other poses or other options",
                               "give the same ones to finish it, or --force to throw it away")  # fmt: skip
        try:
            if not partial.holds(outputs):
                partial.drop_unfinished()
            yield partial
        except BaseException:
            if not partial.hashes and not partial.staged:
                partial.remove()
            raise


def read_state(folder: Path) -> dict[str, Any] | None:
    """Read state.json; return None if it is missing or not a valid state."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and {"fingerprint", "segments", "staged"} <= {*state} else None


def _refuse_foreign(folder: Path) -> None:
    """Raise OutputExists if a folder without a state holds more than a kill during the very first write leaves."""
    for path in folder.iterdir():
        if path.name != STATE and not path.name.startswith(f".{Path(STATE).stem}."):
            raise _foreign(folder)


def _foreign(folder: Path) -> OutputExists:
    return OutputExists(f"{folder} is there and holds no unfinished render",
                        "move it away, or choose another name for the output")  # fmt: skip


@contextmanager
def _locked(folder: Path, output: Path) -> Iterator[None]:
    """Make the folder and lock it against other processes. output: the file to name if the folder cannot be made."""
    if folder.is_file():
        raise _foreign(folder)
    with ExitStack() as held:
        try:
            with writing(output):
                held.enter_context(alone_at(folder, lambda: folder.mkdir(parents=True, exist_ok=True)))
        except BlockingIOError as error:
            raise PoseCrafterError(f"another process is rendering into {folder}",
                                   "wait for it, or choose another name for the output") from error  # fmt: skip
        yield
