"""A stretch of a video that rendered frames take the place of; the video's other frames stay as they are.

Layer 5: reads the video as a stream; how the frames are rendered is not its business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np

from posecrafter_rt.errors import VideoError
from posecrafter_rt.framing import check_canvas, check_one_pose_a_frame
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.runtime.seams import draw_to_anchors
from posecrafter_rt.video_io import stream_video, video_size


@dataclass(frozen=True)
class Stretch:
    """Frames [start, stop) of a video; see `open_stretch`.

    video: a video or a folder of images. size: (height, width) that its frames are fitted to. fps: its own.
    frames_sha256: of all its frames as fitted, 64 hexadecimal digits. before, after: the frames on either side, (H, W, 3)
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
        """Which of the video's frames are to be rendered: the stretch, and those on either side, to compare with."""
        return slice(self.start - (self.before is not None), self.stop + (self.after is not None))

    @property
    def inside(self) -> slice:
        """Which of the rendered ones are of the stretch."""
        first = self.start - self.rendered.start
        return slice(first, first + self.stop - self.start)

    def draw_to_neighbours(self, rendered: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Of the frames `self.rendered`, those of the stretch, drawn to the real frames on either side; see `seams`."""
        return draw_to_anchors(rendered, self.stop - self.start, self.before, self.after)

    def mend(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The video with `frames`, stop - start of them, in place of the stretch: (H, W, 3) uint8, one at a time.

        The frames before the stretch come first, before one of `frames` is asked for; that is taken to its end.
        Raises: VideoError when the video can no longer be read, or at the end when it is not what it was.
        """
        digest = sha256()
        own = _hashed(stream_video(self.video, size=self.size)[0], digest.update)
        yield from islice(own, self.start)
        for frame in frames:
            next(own, None)  # it gives way
            yield frame
        yield from own
        if digest.hexdigest() != self.frames_sha256:
            raise VideoError(f"{self.video} was changed while it was mended", "run the same command again")

    def replaced(self) -> Iterator[np.ndarray]:
        """The video's own frames in the stretch, (H, W, 3) uint8. Raises: as `mend`."""
        return stream_video(self.video, size=self.size, start=self.start, stop=self.stop)[0]


def open_stretch(video: Path, window: slice, size: tuple[int, int], poses: PoseSequence) -> Stretch:
    """Read a video once from end to end, holding three frames, and check that a stretch of it can be rendered.

    Args: window: the stretch; an open side is that of the video. size: (height, width) to fit its frames to, as those
        that are tuned on. poses: of the video, one a frame.
    Raises: VideoError when the video cannot be read or has no such frames; PoseError unless it has a frame for each pose,
        of their canvas's shape.
    """
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
        raise VideoError(f"{video} has {num_frames} frames, and {start}:{stop} is not within them",
                         f"frames are counted from 0; give START and END of 0 to {num_frames}")  # fmt: skip
    return Stretch(video, start, stop, size, fps, digest.hexdigest(), beside.get(start - 1), beside.get(stop))


def _hashed(frames: Iterable[np.ndarray], update: Callable[[bytes], object]) -> Iterator[np.ndarray]:
    """The same frames; a digest is updated with each as it passes."""
    for frame in frames:
        update(frame.tobytes())
        yield frame
