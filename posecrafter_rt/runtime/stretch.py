"""A stretch of a video that rendered frames replace; the video's other frames stay as they are.

Layer 5: reads the video as a stream; does not know how frames are rendered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from os import PathLike
from pathlib import Path

import numpy as np

from posecrafter_rt.errors import VideoError
from posecrafter_rt.framing import check_canvas, check_one_pose_a_frame
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.poses.shown import not_within
from posecrafter_rt.runtime.seams import draw_to_anchors
from posecrafter_rt.video_io import stream_video, video_size


@dataclass(frozen=True)
class Stretch:
    """Frames [start, stop) of a video; see `open_stretch`.

    video: a video or a folder of images. size: (height, width) that its frames are fitted to. fps: the video's.
    frames_sha256: of all its fitted frames, 64 hexadecimal digits. before, after: the frames on either side, (H, W, 3)
        uint8; None where the video begins or ends.
    """

    video: Path
    start: int
    stop: int
    size: tuple[int, int]
    fps: float
    frames_sha256: str
    before: np.ndarray | None
    after: np.ndarray | None

    @property
    def rendered(self) -> slice:
        """Which of the video's frames are to be rendered: the stretch, and the frame on either side to compare."""
        return slice(self.start - (self.before is not None), self.stop + (self.after is not None))

    @property
    def inside(self) -> slice:
        """Which of the rendered frames belong to the stretch."""
        first = self.start - self.rendered.start
        return slice(first, first + self.stop - self.start)

    def draw_to_neighbours(self, rendered: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the stretch out of the frames `self.rendered`, drawn towards the real frames beside it; see `seams`."""
        return draw_to_anchors(rendered, self.stop - self.start, self.before, self.after)

    def mend(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the video with `frames`, stop - start of them, in place of the stretch: (H, W, 3) uint8, one at a time.

        The frames before the stretch come first, before any of `frames` is asked for. `frames` is consumed to its end.
        Raises: VideoError if the video can no longer be read, or at the end if it has changed.
        """
        digest = sha256()
        own = _hashed(stream_video(self.video, size=self.size)[0], digest.update)
        yield from islice(own, self.start)
        for frame in frames:
            next(own, None)  # the frame that is replaced
            yield frame
        yield from own
        if digest.hexdigest() != self.frames_sha256:
            raise VideoError(f"{self.video} was changed while it was mended", "run the same command again")

    def replaced(self) -> Iterator[np.ndarray]:
        """Yield the video's own frames of the stretch, (H, W, 3) uint8. Raises: VideoError if it cannot be read."""
        return stream_video(self.video, size=self.size, start=self.start, stop=self.stop)[0]


def open_stretch(video: str | PathLike[str], window: slice, size: tuple[int, int], poses: PoseSequence) -> Stretch:
    """Read a video once from end to end, holding three frames, and check that a stretch of it can be rendered.

    Args: window: the stretch; an open side is that of the video. size: (height, width) to fit its frames to, as
        training frames are. poses: of the video, one per frame.
    Raises: VideoError if the video cannot be read or has no such frames; PoseError unless it has one frame per pose,
        and frames of the shape of the poses' canvas.
    """
    video = Path(video)
    check_canvas(video, video_size(video), poses.canvas)
    frames, fps = stream_video(video, size=size)
    digest, num_frames = sha256(), 0
    beside: dict[int, np.ndarray] = {}
    start = window.start or 0
    for frame in _hashed(frames, digest.update):
        if num_frames in (start - 1, window.stop):
            beside[num_frames] = frame
        num_frames += 1
    check_one_pose_a_frame(video, num_frames, len(poses))
    stop = num_frames if window.stop is None else window.stop
    if not start < stop <= num_frames:
        raise VideoError(*not_within(f"{video} has {num_frames} frames", slice(start, stop), num_frames))
    return Stretch(video, start, stop, size, fps, digest.hexdigest(), beside.get(start - 1), beside.get(stop))


def _hashed(frames: Iterable[np.ndarray], update: Callable[[bytes], object]) -> Iterator[np.ndarray]:
    """Yield the same frames, and update a digest with each as it passes."""
    for frame in frames:
        update(frame.tobytes())
        yield frame
