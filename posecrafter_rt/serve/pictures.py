"""Encode frames as the bytes of a picture.

Layer 7: OpenCV.
"""

from __future__ import annotations

import cv2
import numpy as np

from posecrafter_rt.serve.protocol import JPEG


def encode_picture(frame: np.ndarray, form: int, quality: int) -> bytes:
    """Encode a frame, uint8 (H, W, 3) RGB, as JPEG of quality 1 to 100, or as raw rows."""
    if form != JPEG:
        return frame.tobytes()
    _, data = cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return data.tobytes()
