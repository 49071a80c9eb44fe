"""Hide the seams of a rendered stretch of video: draw its frames towards the real ones beside it.

Layer 5: works on pictures alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np

REACH = 48  # how many frames away from a real frame it still acts; as many are held, however long the stretch
_STRANGE = 20.0  # a mean difference of this many grey levels means another thing, not the same one moved
_SMALLEST_THING = 32  # that difference is averaged over the picture's short side divided by this


@dataclass(frozen=True)
class Anchor:
    """A real frame beside a stretch, and the same frame rendered; both (H, W, 3) uint8."""

    real: np.ndarray
    rendered: np.ndarray

    def lack(self, frame: np.ndarray) -> np.ndarray:
        """Estimate what a rendered frame lacks: (H, W, 3) float32, in grey levels.

        lack(p) = exp(-(d(p) / 20)²) · (real - rendered)(p + v(p)), with v the optical flow from `frame` to `rendered`,
        and d the difference between `frame` and `rendered` moved by it, averaged around p. This is what the render
        lacks at the anchor, carried along with the picture's movement. It vanishes where the frame shows another thing.
        """
        grey, anchored = (cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in (frame, self.rendered))
        flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(grey, anchored, None)  # type: ignore[call-overload]
        height, width = grey.shape
        x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
        x, y = x + flow[..., 0], y + flow[..., 1]

        def carried(picture: np.ndarray) -> np.ndarray:
            return cv2.remap(picture, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

        rendered = self.rendered.astype(np.float32)
        distance = cv2.absdiff(frame.astype(np.float32), carried(rendered)).mean(-1)
        distance = cv2.GaussianBlur(distance, (0, 0), min(height, width) / _SMALLEST_THING)
        lack: np.ndarray = carried(self.real - rendered) * np.exp(-((distance / _STRANGE) ** 2))[..., None]
        return lack


def draw_to_anchors(
    rendered: Iterable[np.ndarray], num_frames: int, before: np.ndarray | None, after: np.ndarray | None
) -> Iterator[np.ndarray]:
    """Yield the frames of a stretch, changed so that they join the real frames at its ends.

    Frame i of n gets what it lacks by each `Anchor`, times 1 - d/(o + 1), or nothing if d > o. d = i + 1 or n - i is
    its distance from the anchor, and o = min(n, REACH). In a stretch no longer than REACH the two weights sum to 1.
    Args: rendered: (H, W, 3) uint8 each: the frame before the stretch, if `before` is given; the `num_frames` of the
        stretch; the frame after it, if `after` is given. It is consumed to its end. before, after: those frames as they
        are in the video, of the same shape; None where the video begins or ends.
    Yields: `num_frames` frames (H, W, 3) uint8. At most REACH of them are held.
    """
    own = iter(rendered)
    first = None if before is None else Anchor(before, next(own))
    reach = min(num_frames, REACH)
    num_free = num_frames if after is None else num_frames - reach
    for index in range(num_free):
        yield _add(next(own), [(first, index + 1)], reach)
    held = list(own)
    last = None if after is None else Anchor(after, held.pop())
    for index, frame in enumerate(held, num_free):
        yield _add(frame, [(first, index + 1), (last, num_frames - index)], reach)


def _add(frame: np.ndarray, anchors: list[tuple[Anchor | None, int]], reach: int) -> np.ndarray:
    """Return a frame with what it lacks by each anchor added. anchors: each with its distance in frames."""
    drawn = frame.astype(np.float32)
    for anchor, distance in anchors:
        if anchor is not None and distance <= reach:
            drawn += (1 - distance / (reach + 1)) * anchor.lack(frame)
    return drawn.round().clip(0, 255).astype(np.uint8)
