"""The streaming loop: a pose in, a frame out, each in the same time and memory (METHOD: Streaming).

Layer 5. `AvatarStream.step` is the loop; `StreamReference` is what all streams of an avatar share.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from posecrafter_rt.engines.base import Engine, beside
from posecrafter_rt.errors import NotFinite, PoseCrafterError
from posecrafter_rt.method.dpmpp import dpmpp_step_
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.runtime.live import PoseFollower
from posecrafter_rt.runtime.memory import STREAM_ADVICE, explained
from posecrafter_rt.runtime.options import Decoder
from posecrafter_rt.runtime.prepare import edit_latents, embed_poses
from posecrafter_rt.runtime.render import decode
from posecrafter_rt.runtime.stream_denoiser import Sampling, StreamDenoiser
from posecrafter_rt.runtime.stream_options import StreamOptions


class StepInfo(NamedTuple):
    """How a stream treated its newest pose. If it is pipelined, the frame of that pose is yet to come.

    held: nobody was seen. is_repeat: nothing had moved, so the frame before was returned again; never while several
    poses are on their way in a pipeline. reset: the pose was far from the one before, so its frame attends to no past
    frame, only to the reference. lost: the stream went on in float32, and the frames on their way in a pipeline are lost.
    """

    held: bool = False
    is_repeat: bool = False
    reset: bool = False
    lost: bool = False


@dataclass(frozen=True)
class StreamReference:
    """What all streams of an avatar with the same options share. Nobody writes to it.

    pose: (134, 3) on a canvas of the frame size. inverted_latents: (4, h, w). frame: (H, W, 3) uint8, the reference as
    the stream renders it. memory: `controlnet_stream`, `unet_stream` or `temporal` → tensor name → (S, …), the
    reference's keys and values at every step. decoder: of frames.
    """

    pose: np.ndarray
    inverted_latents: Tensor
    frame: np.ndarray
    sampling: Sampling
    memory: dict[str, dict[str, Tensor]]
    decoder: Decoder = "full"


def _batch(frames: list[Tensor], out: Tensor) -> Tensor:
    """Concatenate tensors of one frame each, (1, …), in `out`. A single one is returned itself, not copied."""
    return frames[0] if len(frames) == 1 else torch.cat(frames, out=out)


def _keep(tensors: Mapping[str, Tensor], kept: dict[str, Tensor]) -> None:
    """Copy tensors into `kept` by name; those that are not there yet are made."""
    for name, tensor in tensors.items():
        if name in kept:
            kept[name].copy_(tensor)
        else:
            kept[name] = tensor.clone()


@torch.inference_mode()
def sample_reference(
    engines: Mapping[str, Engine], sampling: Sampling, inverted_latents: Tensor, pose: np.ndarray, size: tuple[int, int],
    decoder: Decoder = "full",
) -> StreamReference:  # fmt: skip
    """Denoise the reference alone, with its own pose, and keep its keys and values at every step and layer.

    Args: inverted_latents: (4, h, w) at the first step's noise level. pose: (134, 3) on a canvas of the frames' `size`.
    """
    denoise = StreamDenoiser(engines, sampling, 0)
    embedding = embed_poses(engines, PoseSequence(pose[None], size), size)
    latents, parts = inverted_latents[None].clone(), []
    pred_original_samples = _room_for_samples(inverted_latents, sampling)
    for index in range(len(sampling.terms)):
        predicted = denoise(latents, embedding, slice(index, index + 1))
        parts.append({name: {key: kept.clone() for key, kept in tensors.items()}
                      for name, tensors in predicted.memory.items()})  # fmt: skip
        _step_(latents, predicted.noise_pred, pred_original_samples, index, sampling)
    memory = {name: {key: torch.cat([part[name][key] for part in parts]) for key in tensors}
              for name, tensors in parts[0].items()}  # fmt: skip
    frame = next(decode(engines, latents, decoder))
    return StreamReference(pose, inverted_latents, frame, sampling, memory, decoder)


def _room_for_samples(inverted_latents: Tensor, sampling: Sampling) -> Tensor:
    """Make room for the x_0 that is predicted for the last frame at each step: (S, 4, h, w)."""
    return inverted_latents.new_zeros(len(sampling.terms), *inverted_latents.shape)


@torch.inference_mode()
def _step_(latents: Tensor, noise_pred: Tensor, samples: Tensor, step: int, sampling: Sampling) -> None:
    """Take a frame (1, 4, h, w) through a step, in place. The first step has no x_0 before it, and reads none.

    samples: the x_0 that each step predicted; see `_room_for_samples`.
    """
    before, pred_original_sample = samples[step - 1 : step], samples[step : step + 1]
    dpmpp_step_(latents, noise_pred, before, pred_original_sample, sampling.terms[step])


class AvatarStream:
    """One person following one source of poses; a context manager. Made by `Avatar.stream`.

    Frames are denoised one after another, and `step` returns the frame of its pose. With `is_pipelined` the last
    `steps` poses are denoised at once, each one step further, in one call of the networks per frame. Then `step`
    returns the frame of the pose given `steps - 1` calls before, and the reference's frame until there is one.
    last: how the newest pose was treated. Streams of one avatar must not step at the same time.
    """

    def __init__(
        self, engines: Mapping[str, Engine], reference: StreamReference, options: StreamOptions,
        widen: Callable[[StreamReference, Callable[[], None]], tuple[Mapping[str, Engine], StreamReference]] | None = None,
    ) -> None:  # fmt: skip
        """widen: takes the reference with which a frame was not finite, and a function. Returns networks of a wider
        type and the reference as they sample it, or raises PoseCrafterError if there are none. Before it loads them it
        calls the function, which frees this stream's memory: there may not be enough for both. None: there are none.
        """
        self.options, self._widen, self._process = options, widen, os.getpid()
        self.size = (reference.frame.shape[0], reference.frame.shape[1])
        self.last = StepInfo()
        self._poses = PoseFollower(reference.pose, self.size, options.live)
        self._begin(engines, reference)

    def _begin(self, engines: Mapping[str, Engine], reference: StreamReference) -> None:
        """Go on with these networks; the next frame attends to the reference only."""
        self._denoiser = StreamDenoiser(engines, reference.sampling, self.options.window, reference.memory)
        self.engines, self.reference, self._frame = engines, reference, reference.frame
        self._pending: list[_PendingFrame] = []
        # Everything that steps write to, made once; the first frame sizes the last three.
        self._pred_original_samples = _room_for_samples(reference.inverted_latents, reference.sampling)
        self._latents, self._embeddings = (self._pred_original_samples.new_empty(0) for _ in range(2))
        self._features: dict[str, Tensor] = {}  # of the last whole step, for the shallow steps after it
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        """Whether `step` can return no more frames."""
        return self._is_closed

    @explained(STREAM_ADVICE)
    def step(self, pose: np.ndarray | None) -> np.ndarray:
        """Return the next frame.

        Args: pose: float (134, 3) on a canvas of `size`. None, or fewer than 3 keypoints seen: nobody is seen, and the
            last pose is held, then eased to the reference pose.
        Returns: (H, W, 3) uint8 RGB, a new array.
        Raises: PoseError for another shape, numbers that are not finite and confidences outside 0 to 1; these change
            nothing. PoseCrafterError once the stream is closed, and in a process forked since it was opened. After any
            other error, such as OutOfMemory, the stream is as after `reset`.

        If a frame is not finite in 16 or 8 bits, it is computed again in float32, as the first frame after the
        reference. All later frames are computed in float32, too, and a warning says so. Frames on their way in a
        pipeline are lost. If the float32 networks cannot be loaded, the stream is closed.
        """
        if self._is_closed:
            raise PoseCrafterError("this stream is closed", "open another: avatar.stream()")
        if os.getpid() != self._process:  # as for the avatar: see `Networks`
            raise PoseCrafterError("this stream was opened before a fork", "load its avatar in each worker")
        live = self._poses.next(pose)
        self.last = StepInfo(live.held, live.is_repeat and not self._pending, live.jumped)
        if not self.last.is_repeat:
            try:
                self._render(live.pose, live.jumped)
            except BaseException:
                self.reset()  # some steps have remembered the frame, others have not
                raise
        return self._frame.copy()

    def _render(self, pose: np.ndarray, jumped: bool) -> None:
        """Denoise, and decode the frame that is done. If it is not finite, do so again in a wider type."""
        while not self._has_rendered(pose, jumped):  # widened outside the handler, whose traceback holds the networks
            assert self._widen is not None
            self._begin(*self._widen(self.reference, self.close))
            self.last = self.last._replace(lost=self.options.is_pipelined)

    def _has_rendered(self, pose: np.ndarray, jumped: bool) -> bool:
        """Render once. Return False if the frame is not finite and there may be a wider type."""
        try:
            with beside(self.engines["unet_stream"]):
                self._render_once(pose, jumped)
        except NotFinite:
            if self._widen is None:
                raise
            return False
        return True

    def _render_once(self, pose: np.ndarray, jumped: bool) -> None:
        frame = self._prepare_frame(pose, jumped)
        finished = self._advance_pipeline(frame) if self.options.is_pipelined else self._denoise_frame(frame)
        if finished is not None:
            self._frame = next(decode(self.engines, finished.latents, self.reference.decoder))

    def _prepare_frame(self, pose: np.ndarray, starts_anew: bool) -> _PendingFrame:
        """Edit latents for a pose and embed it, which is all that its denoising needs (method step 4)."""
        target = PoseSequence(pose[None], self.size)
        latents, _ = edit_latents(self.reference.inverted_latents, self.reference.pose, target, self.options)
        return _PendingFrame(latents[1:], embed_poses(self.engines, target, self.size), starts_anew)

    def _denoise_frame(self, frame: _PendingFrame) -> _PendingFrame:
        """Do all steps of one frame."""
        if frame.starts_anew:
            self._denoiser.forget(slice(None))
        for index in range(self.options.steps):
            self._advance([frame], slice(index, index + 1), is_whole=index % self.options.unet_every == 0)
        return frame

    def _advance_pipeline(self, frame: _PendingFrame) -> _PendingFrame | None:
        """Do one step of every frame on its way, the newest at step 0. Return the frame that is done, if one is."""
        if not self._pending:  # fillers keep the batch's size constant; nobody sees or attends to them
            self._pending = [replace(frame, latents=frame.latents.clone(), is_filler=True)
                             for _ in range(self.options.steps - 1)]  # fmt: skip
        self._pending.insert(0, frame)
        for step, other in enumerate(self._pending):
            if other.starts_anew:
                self._denoiser.forget(slice(step, step + 1))
        self._advance(self._pending, slice(0, len(self._pending)))
        finished = self._pending.pop()
        return None if finished.is_filler else finished

    @torch.inference_mode()
    def _advance(self, frames: list[_PendingFrame], steps: slice, is_whole: bool = True) -> None:
        """Take frames, one at each of `steps`, through that step; one frame alone if the shallow U-Net does it."""
        latents = _batch([frame.latents for frame in frames], self._latents)
        if is_whole:
            embeddings = _batch([frame.embedding for frame in frames], self._embeddings)
            predicted = self._denoiser(latents, embeddings, steps)
            if self.options.unet_every > 1:
                _keep(predicted.features, self._features)
        else:
            predicted = self._denoiser.shallow(latents, self._features, steps)
        at = list(enumerate(range(*steps.indices(self.options.steps))))
        self._denoiser.remember(
            predicted.memory["temporal"], [(row, step) for row, step in at if not frames[row].is_filler])  # fmt: skip
        sampling = self.reference.sampling
        for row, step in reversed(at):  # step s reads the x_0 that step s - 1 overwrites
            noise_pred, samples = predicted.noise_pred[row : row + 1], self._pred_original_samples
            _step_(frames[row].latents, noise_pred, samples, step, sampling)

    @torch.inference_mode()
    def reset(self) -> None:
        """Forget all poses and frames; the next frame counts as the first."""
        if self._is_closed:
            return
        self._denoiser.wipe()
        self._pred_original_samples.zero_()
        self._poses.reset()
        self._frame, self._pending, self.last = self.reference.frame, [], StepInfo()

    def close(self) -> None:
        """Free the stream's memory."""
        if not self._is_closed:
            self._is_closed = True
            del self._denoiser, self._features, self._pred_original_samples, self._latents, self._embeddings
        self.engines, self._pending = {}, []

    def __enter__(self) -> AvatarStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass
class _PendingFrame:
    """A frame on its way: its latents (1, 4, h, w), which steps overwrite, and its pose's embedding.

    starts_anew: neither it nor a later frame attends to those before it. is_filler: it only fills the batch.
    """

    latents: Tensor
    embedding: Tensor
    starts_anew: bool
    is_filler: bool = False
