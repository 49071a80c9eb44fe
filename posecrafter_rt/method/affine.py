"""The least-squares affine map between two sets of landmarks (Eq. 18-19).

Layer 1: numpy only.
"""

from __future__ import annotations

import numpy as np

from posecrafter_rt.errors import ShapeError

# Least ratio of the smaller singular value to the larger. Below 1/100, a landmark that is off by one pixel along the
# thin direction moves the map's far end by a hundred pixels. It is then better to have no map.
MIN_CONDITION = 1e-2
# Points that spread over fewer pixels count as one point, to which nothing can be fitted.
MIN_SPREAD_PX = 1e-6


def fit_affine(src: np.ndarray, dst: np.ndarray, *, weights: np.ndarray | None = None) -> np.ndarray | None:
    """Return the affine map that carries `src` to `dst` best.

    A = argmin sum_k w_k |A [x_k, y_k, 1]^T - [x'_k, y'_k]^T|^2   (Eq. 18-19)
    Both point sets are centred and brought to unit spread first, so that the normal equations are well conditioned
    wherever the points lie and whatever their unit.
    Args:
        src: (K, 2) x, y; finite.
        dst: (K, 2) x, y; finite.
        weights: (K,) >= 0, or None for equal weights. Points of weight 0 count as absent.
    Returns: float64 (2, 3), or None if there is no usable map: fewer than 3 points, points (nearly) on one line or in
        one place, or a map whose linear part is (nearly) singular.
    Raises: ShapeError for shapes that do not fit, numbers that are not finite, or a negative weight.
    """
    affine, _ = fit_affine_with_reason(src, dst, weights=weights)
    return affine


def fit_affine_with_reason(
    src: np.ndarray, dst: np.ndarray, *, weights: np.ndarray | None = None
) -> tuple[np.ndarray | None, str]:
    """As `fit_affine`, but also return why there is no map; the reason is empty if there is one."""
    src, dst, weights = _checked_points(src, dst, weights)
    if len(src) < 3:
        return None, f"{len(src)} usable landmarks, 3 are needed"
    weights = weights / weights.sum()
    src_mean, dst_mean = weights @ src, weights @ dst
    src_spread = _spread(src - src_mean, weights)
    dst_spread = _spread(dst - dst_mean, weights)
    if src_spread < MIN_SPREAD_PX:
        return None, "the reference landmarks lie in one place"
    if dst_spread < MIN_SPREAD_PX:
        return None, "the target landmarks lie in one place"
    src_unit, dst_unit = (src - src_mean) / src_spread, (dst - dst_mean) / dst_spread
    moments = (src_unit * weights[:, np.newaxis]).T @ src_unit  # (2, 2), symmetric, trace 1
    small, large = np.linalg.eigvalsh(moments)
    if small < MIN_CONDITION**2 * large:  # eigenvalues are the squares of the points' spread along each axis
        return None, "the reference landmarks lie nearly on one line"
    cross = (src_unit * weights[:, np.newaxis]).T @ dst_unit
    linear = np.linalg.solve(moments, cross).T * (dst_spread / src_spread)
    scales = np.linalg.svd(linear, compute_uv=False)
    if scales[1] <= MIN_CONDITION * scales[0]:  # equal if both are 0
        return None, "the map from the reference to the target landmarks is nearly singular"
    return np.column_stack([linear, dst_mean - linear @ src_mean]), ""


def _spread(centred: np.ndarray, weights: np.ndarray) -> float:
    """Return the root of the weighted mean square distance from the centre."""
    return float(np.sqrt(weights @ (centred**2).sum(axis=1)))


def _checked_points(
    src: np.ndarray, dst: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    src, dst = np.asarray(src, dtype=np.float64), np.asarray(dst, dtype=np.float64)
    if src.ndim != 2 or src.shape[1] != 2 or src.shape != dst.shape:
        raise ShapeError(f"landmarks of shapes {src.shape} and {dst.shape}", hint="give two arrays of shape (K, 2)")
    weights = np.ones(len(src)) if weights is None else np.asarray(weights, dtype=np.float64)
    if weights.shape != (len(src),):
        raise ShapeError(
            f"weights of shape {weights.shape} for {len(src)} landmarks", hint="give one weight a landmark"
        )
    if not (np.isfinite(src).all() and np.isfinite(dst).all() and np.isfinite(weights).all()):
        raise ShapeError("landmarks or weights hold NaN or infinity", hint="leave missing landmarks out")
    if (weights < 0).any():
        raise ShapeError(f"a landmark has the weight {weights.min()}", hint="weights are 0 or more")
    present = weights > 0
    return src[present], dst[present], weights[present]
