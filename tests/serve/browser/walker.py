"""A drawn person who walks to the right, for pages that show it.

Tests.
"""

from __future__ import annotations

import cv2
import numpy as np

from posecrafter_rt.poses.draw import draw_pose
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.serve.pictures import encode_picture
from posecrafter_rt.serve.protocol import JPEG
from tests.serve.browser.pages import LivePage
from tests.serve.drawn import SIZE, DrawnAvatar

STILL = {"reduced_motion": "reduce"}  # where nothing has to move: without a GPU, moving takes a core
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True, **STILL}


def person(x: float = 0.0, y: float = 0.0) -> np.ndarray:
    """Somebody who stands upright, moved by some pixels: body and left hand, float32 (134, 3)."""
    body = [(24, 12), (24, 20), (18, 20), (15, 28), (13, 36), (30, 20), (33, 28), (35, 36), (20, 36), (20, 46), (20, 56),
            (28, 36), (28, 46), (28, 56), (23, 10), (25, 10), (21, 11), (27, 11)]  # fmt: skip
    pose = np.zeros((134, 3), np.float32)
    pose[:18] = [(px + x, py + y, 1) for px, py in body]
    pose[92:113] = [(35 + x + finger % 4, 37 + y + finger // 4, 1) for finger in range(21)]
    return pose


def walking_avatar() -> DrawnAvatar:
    """Walks to the right in five poses."""
    avatar = DrawnAvatar()
    avatar.poses = PoseSequence(np.stack([person(x) for x in range(-4, 6, 2)]), SIZE, 25.0)
    return avatar


def drawn(pose: np.ndarray) -> np.ndarray:
    """What the server sends of this pose, int (H, W, 3)."""
    data = np.frombuffer(encode_picture(draw_pose(pose, SIZE), JPEG, 85), np.uint8)
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB).astype(int)


def assert_shows(page: LivePage, pose: np.ndarray) -> None:
    """Wait until the avatar is this pose's drawing; half a pixel beside it is 2 to 3 levels away."""
    expected = drawn(pose)

    def is_shown() -> bool:
        pixels = page.pixels()  # of another size before the first frame
        return pixels.shape == expected.shape and np.abs(pixels - expected).mean() < 0.5

    page.wait_until(is_shown)


def pause_demo(page: LivePage, index: int) -> None:
    page.wait_for_link("Live")
    page.page.get_by_role("button", name="Pause").click()
    page.page.get_by_label("Position").fill(str(index))
