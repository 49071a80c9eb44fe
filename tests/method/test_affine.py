"""The least-squares affine map: exact recovery, invariances and every reason for there being none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from posecrafter_rt.errors import ShapeError
from posecrafter_rt.method import fit_affine
from posecrafter_rt.method.affine import fit_affine_with_reason

SQUARE = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0], [4.0, 3.0]])


def apply(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ affine[:, :2].T + affine[:, 2]


def points(low: int = 3, high: int = 68) -> st.SearchStrategy[np.ndarray]:
    """Points on a grid of a hundredth, so that a near-degenerate cloud is rare and every spread is well above zero."""
    count = st.integers(low, high)
    return count.flatmap(
        lambda k: hnp.arrays(np.float64, (k, 2), elements=st.integers(-50_000, 50_000), fill=st.nothing())
    ).map(lambda cloud: cloud / 100)


@st.composite
def maps(draw: st.DrawFn) -> np.ndarray:
    """Affine maps whose linear part is far from singular: a rotation, two scales within 1:10 and a shift."""
    angles = draw(st.tuples(*[st.floats(-np.pi, np.pi)] * 2))
    scales = draw(st.tuples(*[st.floats(0.3, 3.0)] * 2))
    shift = draw(st.tuples(*[st.floats(-500, 500)] * 2))
    first, second = (np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in angles)
    return np.column_stack([first @ np.diag(scales) @ second, shift])


def is_spread(cloud: np.ndarray) -> bool:
    values = np.linalg.svd(cloud - cloud.mean(axis=0), compute_uv=False)
    return values[1] > 0.05 * values[0] and values[0] > 1e-3


@given(points(), maps())
def test_recovers_an_affine_map_exactly(cloud, affine):
    assume(is_spread(cloud))
    fitted = fit_affine(cloud, apply(affine, cloud))
    assert fitted is not None and fitted.dtype == np.float64 and fitted.shape == (2, 3)
    np.testing.assert_allclose(apply(fitted, cloud), apply(affine, cloud), atol=1e-6)
    np.testing.assert_allclose(fitted[:, :2], affine[:, :2], atol=1e-6)


@given(points(high=30), points(high=30))
def test_minimises_the_squared_error(src, dst):
    count = min(len(src), len(dst))
    src, dst = src[:count], dst[:count]
    assume(is_spread(src))
    fitted = fit_affine(src, dst)
    assume(fitted is not None)
    homogeneous = np.column_stack([src, np.ones(count)])
    expected = np.linalg.lstsq(homogeneous, dst, rcond=None)[0].T
    np.testing.assert_allclose(fitted, expected, rtol=1e-6, atol=1e-6 * (1 + np.abs(dst).max()))


@given(points(high=20), maps(), st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)), st.randoms())
def test_does_not_depend_on_order_or_origin(cloud, affine, shift, random):
    assume(is_spread(cloud))
    target = apply(affine, cloud) + np.sin(cloud)
    fitted = fit_affine(cloud, target)
    assume(fitted is not None)
    order = list(range(len(cloud)))
    random.shuffle(order)
    reordered = fit_affine(cloud[order], target[order])
    np.testing.assert_allclose(reordered, fitted, atol=1e-7, rtol=1e-9)
    moved = fit_affine(cloud + shift, target + shift)
    np.testing.assert_allclose(apply(moved, cloud + shift), apply(fitted, cloud) + shift, atol=1e-6)


def test_a_far_origin_costs_no_precision():
    far = SQUARE + 1e7
    np.testing.assert_allclose(apply(fit_affine(far, SQUARE), far), SQUARE, atol=1e-6)


def test_integer_weights_are_repetitions():
    src = np.array([[0, 0], [5, 1], [2, 7], [9, 9.0]])
    dst = np.array([[1, 0], [6, 1], [1, 8], [8, 8.5]])
    repeated = fit_affine(np.repeat(src, [1, 2, 3, 1], axis=0), np.repeat(dst, [1, 2, 3, 1], axis=0))
    np.testing.assert_allclose(fit_affine(src, dst, weights=np.array([1, 2, 3, 1])), repeated, atol=1e-12)


def test_points_of_weight_zero_are_absent():
    dst = SQUARE.copy()
    dst[3] += 100
    np.testing.assert_allclose(fit_affine(SQUARE, dst, weights=np.array([1, 1, 1, 0])), np.eye(2, 3), atol=1e-12)
    assert fit_affine(SQUARE, dst, weights=np.array([1, 1, 0, 0])) is None


LINE = np.array([[0.0, 0.0], [1.0, 2.0], [2.0, 4.0], [3.0, 6.0]])
NONE_CASES = {
    "no points": (SQUARE[:0], SQUARE[:0], "0 usable landmarks"),
    "two points": (SQUARE[:2], SQUARE[:2], "2 usable landmarks"),
    "reference on a line": (LINE, SQUARE, "on one line"),
    "reference almost on a line": (LINE + SQUARE * 1e-4, SQUARE, "on one line"),
    "reference in one place": (SQUARE * 0 + 5, SQUARE, "reference landmarks lie in one place"),
    "target on a line": (SQUARE, LINE[[0, 1, 2, 3]], "singular"),
    "target almost on a line": (SQUARE, LINE + SQUARE[::-1] * 1e-4, "singular"),
    "no likeness at all": (
        np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0], [-1.0, 1.0]]),
        np.array([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]),
        "singular",
    ),
    "target in one place": (SQUARE, SQUARE * 0 - 3, "target landmarks lie in one place"),
}


@pytest.mark.parametrize(("src", "dst", "reason"), NONE_CASES.values(), ids=NONE_CASES.keys())
def test_gives_none_with_the_reason(src, dst, reason):
    affine, said = fit_affine_with_reason(src, dst)
    assert affine is None and reason in said
    assert fit_affine(src, dst) is None


def test_a_mirrored_map_is_a_map():
    np.testing.assert_allclose(fit_affine(SQUARE, SQUARE * [-1, 1]), [[-1, 0, 0], [0, 1, 0]], atol=1e-12)


@pytest.mark.parametrize(
    ("src", "dst", "weights"),
    [
        (SQUARE, SQUARE[:3], None),
        (np.zeros((4, 3)), np.zeros((4, 3)), None),
        (SQUARE, SQUARE, np.ones(3)),
        (SQUARE * np.nan, SQUARE, None),
        (SQUARE, SQUARE, np.array([1, 1, 1, -1])),
    ],
)
def test_refuses_shapes_and_values_that_do_not_fit(src, dst, weights):
    with pytest.raises(ShapeError):
        fit_affine(src, dst, weights=weights)
