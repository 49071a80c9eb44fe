"""Fill in points that a detector missed for a few frames, from their neighbours in time.

Layer 1: numpy; a pure function.
"""

from __future__ import annotations

import numpy as np

from posecrafter_rt.poses.keypoints import CONFIDENCE_THRESHOLD, PoseSequence


def fill_gaps(poses: PoseSequence, most: int) -> PoseSequence:
    """Interpolate each point that is missing for at most `most` frames.

    A point below the confidence from which points are drawn counts as missing: detectors hardly ever write 0. It moves
    in a straight line from where it was seen before to where it is seen after, with the lower confidence of the two.
    Longer gaps and points missing at either end stay as they are. Seen points stay the same, bit for bit.
    """
    keypoints = poses.keypoints.copy()
    for point in range(keypoints.shape[1]):
        track = keypoints[:, point]  # (N, 3), a view
        seen = np.flatnonzero(track[:, 2] >= CONFIDENCE_THRESHOLD)
        if not len(seen):
            continue
        missing = np.setdiff1d(np.arange(seen[0], seen[-1]), seen)
        following = np.searchsorted(seen, missing)
        before, after = seen[following - 1], seen[following]
        short = after - before <= most + 1
        missing, before, after = missing[short], before[short], after[short]
        share = ((missing - before) / (after - before))[:, np.newaxis]
        track[missing, :2] = (1 - share) * track[before, :2] + share * track[after, :2]
        track[missing, 2] = np.minimum(track[before, 2], track[after, 2])
    return PoseSequence(keypoints, poses.canvas, poses.fps)
