"""affine_warp_paste: the native paths against the reference bit for bit, the reference against OpenCV.

Tests of posecrafter_rt/ops/affine_warp_paste.py, native.py and csrc/.
"""

from __future__ import annotations

import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch

from posecrafter_rt.errors import BackendUnavailable, ShapeError
from posecrafter_rt.ops import affine_warp_paste, affine_warp_paste_, native
from posecrafter_rt.ops.reference import MODES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((4, 64, 64), (3, 17, 31), (1, 1, 1), (4, 5, 300), (4, 1, 7))
needs_native = pytest.mark.skipif(native.missing_reason() is not None, reason=str(native.missing_reason()))


def make_edits(frames: int, regions: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random affines near the identity and rectangles that stick out, with every degenerate kind among them."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(frames, regions, 2, 3, generator=generator)
    affines = torch.eye(2, 3) + noise * torch.tensor([0.3, 0.3, 3.0])
    rects = torch.randint(-5, size + 5, (frames, regions, 4), generator=generator)
    affines[0, 0] = 0  # singular
    affines[1 % frames, 0, 0, 0] = float("nan")
    affines[2 % frames, 0, 1, 2] = float("inf")
    affines[3 % frames, :] = torch.eye(2, 3)
    affines[4 % frames, 0] = torch.tensor([[1e30, 0, 0], [0, 1e-30, 0]])
    rects[5 % frames, :] = torch.tensor([-(2**60), 0, 2**60, 2**40])
    return affines, rects


def opencv_loop(latent: np.ndarray, affines: np.ndarray, rects: np.ndarray, flags: int) -> np.ndarray:
    """The method's step 4 with cv2.warpAffine, one channel and frame at a time."""
    frames = [latent.copy() for _ in range(len(affines) + 1)]
    for frame, frame_affines, frame_rects in zip(frames[1:], affines, rects, strict=True):
        for affine, (x0, y0, x1, y1) in zip(frame_affines, frame_rects, strict=True):
            for target, source in zip(frame, latent, strict=True):
                warped = cv2.warpAffine(source, affine, source.shape[::-1], flags=flags, borderValue=float("nan"))
                patch, pasted = target[y0:y1, x0:x1], warped[y0:y1, x0:x1]
                np.copyto(patch, pasted, where=~np.isnan(pasted))
    return np.stack(frames)


@pytest.mark.parametrize(("mode", "flags", "tolerance"), [("bilinear", cv2.INTER_LINEAR, 1e-3), ("nearest", 0, 0.0)])
def test_reference_is_what_opencv_does(mode: str, flags: int, tolerance: float) -> None:
    latent = torch.randn(4, 32, 40, generator=torch.Generator().manual_seed(0))
    affines = torch.tensor([[[[1.1, 0.2, -3], [-0.15, 0.9, 4]], [[0.8, 0, 6.1], [0, 0.8, 2.3]]]]).repeat(3, 1, 1, 1)
    rects = torch.tensor([[[5, 6, 20, 20], [10, 12, 36, 30]]]).repeat(3, 1, 1)
    ours = affine_warp_paste(latent, affines, rects, mode, backend="reference").numpy()
    theirs = opencv_loop(latent.numpy(), affines.numpy(), rects.numpy(), flags)
    # OpenCV keeps a nearest sample up to half a pixel beyond the border and blends a bilinear one with the border;
    # these rectangles stay clear of both.
    np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=0)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_equals_reference_bit_for_bit(shape: tuple[int, int, int], mode: str, dtype: torch.dtype) -> None:
    affines, rects = make_edits(7, 3, max(shape), seed=1)
    generator = torch.Generator().manual_seed(2)
    latent = torch.randn(shape, generator=generator).to(dtype)
    ours = affine_warp_paste(latent, affines, rects, mode, backend="native")
    assert torch.equal(ours, affine_warp_paste(latent, affines, rects, mode, backend="reference"))
    latents = torch.randn(8, *shape, generator=generator).to(dtype)
    expected = affine_warp_paste_(latents.clone(), affines, rects, mode, backend="reference")
    strided = torch.empty(*latents.shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2].copy_(latents)
    assert torch.equal(affine_warp_paste_(latents.clone(), affines, rects, mode, backend="native"), expected)
    assert torch.equal(affine_warp_paste_(strided, affines, rects, mode, backend="native"), expected)


@needs_native
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_every_sixteen_bit_value_survives_the_native_conversions(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, 256, 256)
    affines, rects = torch.eye(2, 3).reshape(1, 1, 2, 3), torch.tensor([[[0, 0, 256, 256]]])
    out = affine_warp_paste(values, affines, rects, "nearest", backend="native")[1]
    assert torch.equal(out.isnan(), values.isnan())
    assert torch.equal(out.nan_to_num().view(torch.int16), values.nan_to_num().view(torch.int16))


# Edits two frames in place where there is no memory for their pixels as floats. Prints what came of it.
STARVED = """
import resource, sys
import numpy as np
from posecrafter_rt import _native

def edit(size):
    latents = np.zeros((2, 1, size, size), np.float16)
    affines, rects = np.tile(np.eye(2, 3, dtype=np.float32), (2, 1, 1, 1)), np.tile(np.int64([0, 0, 4, 4]), (2, 1, 1))
    yield
    yield _native.affine_warp_paste_cpu(latents, latents, affines, rects, copy=False, threads=int(sys.argv[1]))

list(edit(8))  # now the threads have their stacks
large = edit(4096)
next(large)
with open("/proc/self/statm") as file:
    held = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (1 << 22), resource.RLIM_INFINITY))
try:
    print(next(large))
except MemoryError:
    print("MemoryError")
"""


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="a process's memory is limited as on Linux")
@pytest.mark.parametrize("threads", [1, 2])
def test_too_little_memory_is_an_error_and_not_the_end_of_the_process(threads: int) -> None:
    ran = subprocess.run([sys.executable, "-c", STARVED, str(threads)], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "MemoryError\n"), ran.stderr


@pytest.mark.parametrize("mode", MODES)
def test_identity_and_whole_translations_copy_exactly(mode: str) -> None:
    latent = torch.randn(4, 8, 9, generator=torch.Generator().manual_seed(3))
    affines = torch.tensor([[[[1.0, 0, 2], [0, 1, -1]]]])
    out = affine_warp_paste(latent, affines, torch.tensor([[[0, 0, 9, 8]]]), mode)
    expected = latent.clone()
    expected[:, :7, 2:] = latent[:, 1:, :7]  # the rest has no source and keeps its own
    assert torch.equal(out[0], latent) and torch.equal(out[1], expected)


def test_the_last_region_wins_and_each_reads_the_unedited_latent() -> None:
    latent = torch.arange(16.0).reshape(1, 4, 4)
    shift = [[[1.0, 0, 1], [0, 1, 0]], [[1.0, 0, 0], [0, 1, 1]]]
    out = affine_warp_paste(latent, torch.tensor([shift]), torch.tensor([[[1, 0, 4, 4], [2, 1, 4, 4]]]))[1, 0]
    expected = latent[0].clone()
    expected[:, 1:] = latent[0][:, :3]
    expected[1:, 2:] = latent[0][:3, 2:]
    assert torch.equal(out, expected)


def test_unit_variance_keeps_the_noise_a_unit_normal() -> None:
    latent = torch.randn(4, 128, 128, generator=torch.Generator().manual_seed(4))
    affines = torch.tensor([[[[1.0, 0, 0.5], [0, 1, 0.5]]]])
    rects = torch.tensor([[[1, 1, 128, 128]]])
    deviation = {mode: affine_warp_paste(latent, affines, rects, mode)[1, :, 1:, 1:].std().item() for mode in MODES}
    assert deviation["bilinear"] == pytest.approx(0.5, abs=0.02)  # four equal weights: the known weakness
    assert deviation["unit_variance"] == pytest.approx(1.0, abs=0.03)
    assert deviation["nearest"] == pytest.approx(1.0, abs=0.03)


def test_no_frames_and_no_regions_are_plain_copies() -> None:
    latent = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(5))
    none = affine_warp_paste(latent, torch.zeros(0, 3, 2, 3), torch.zeros(0, 3, 4, dtype=torch.int64))
    assert torch.equal(none, latent[None])
    plain = affine_warp_paste(latent, torch.zeros(2, 0, 2, 3), torch.zeros(2, 0, 4, dtype=torch.int32))
    assert torch.equal(plain, latent.expand(3, -1, -1, -1))


def test_empty_and_inverted_rectangles_edit_nothing() -> None:
    latent = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(6))
    affines = torch.tensor([[[1.0, 0, 1], [0, 1, 1]]]).expand(1, 3, 2, 3)
    rects = torch.tensor([[[2, 2, 2, 5], [4, 4, 1, 1], [6, 6, 99, 99]]])
    assert torch.equal(affine_warp_paste(latent, affines, rects)[1], latent)


def test_gradient_comes_from_the_reference() -> None:
    latent = torch.randn(1, 5, 5, generator=torch.Generator().manual_seed(7), requires_grad=True)
    affines, rects = make_edits(6, 1, 5, seed=8)
    affine_warp_paste(latent, affines, rects).sum().backward()
    assert latent.grad is not None and latent.grad.isfinite().all()
    if native.missing_reason() is None:
        with pytest.raises(BackendUnavailable, match="gradient"):
            affine_warp_paste(latent, affines, rects, backend="native")


@pytest.mark.parametrize("is_in_place", [False, True])
def test_it_has_a_gradient_with_respect_to_the_maps_too(is_in_place: bool) -> None:
    latents = torch.randn(7, 1, 5, 5, generator=torch.Generator().manual_seed(7))
    affines, rects = make_edits(6, 1, 5, seed=8)
    affines.requires_grad_()
    edited = (
        affine_warp_paste_(latents, affines, rects) if is_in_place else affine_warp_paste(latents[0], affines, rects)
    )
    edited.sum().backward()
    assert affines.grad is not None and affines.grad[5].abs().max() > 1


@pytest.mark.parametrize(
    ("latent", "affines", "rects", "mode"),
    [
        (torch.zeros(4, 4), torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 4, dtype=torch.int64), "bilinear"),
        (torch.zeros(1, 4, 4, dtype=torch.float64), torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 4).long(), "bilinear"),
        (torch.zeros(1, 0, 4), torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 4, dtype=torch.int64), "bilinear"),
        (torch.zeros(1, 4, 4), torch.zeros(1, 2, 3), torch.zeros(1, 1, 4, dtype=torch.int64), "bilinear"),
        (torch.zeros(1, 4, 4), torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 4), "bilinear"),
        (torch.zeros(1, 4, 4), torch.zeros(1, 1, 2, 3), torch.zeros(1, 2, 4, dtype=torch.int64), "bilinear"),
        (torch.zeros(1, 4, 4), torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 4, dtype=torch.int64), "bicubic"),
    ],
)
def test_refuses_what_does_not_fit(latent: torch.Tensor, affines: torch.Tensor, rects: torch.Tensor, mode: str) -> None:
    with pytest.raises(ShapeError):
        affine_warp_paste(latent, affines, rects, mode)


def test_in_place_refuses_a_missing_inserted_frame() -> None:
    with pytest.raises(ShapeError, match="2 latents do not fit 2 edits"):
        affine_warp_paste_(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 2, 3), torch.zeros(2, 1, 4, dtype=torch.int64))


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode: str) -> None:
    affines, rects = make_edits(6, 2, 9, seed=9)
    generator = torch.Generator().manual_seed(10)
    latent, latents = torch.randn(2, 8, 9, generator=generator), torch.randn(7, 2, 8, 9, generator=generator)
    torch.library.opcheck(torch.ops.posecrafter.affine_warp_paste.default, (latent, affines, rects, mode))
    torch.library.opcheck(torch.ops.posecrafter.affine_warp_paste_.default, (latents, affines, rects, mode))


@pytest.mark.gpu
@pytest.mark.skipif(native.cuda_missing_reason() is not None, reason=str(native.cuda_missing_reason()))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda_equals_reference_bit_for_bit(shape: tuple[int, int, int], mode: str, dtype: torch.dtype) -> None:
    affines, rects = make_edits(7, 3, max(shape), seed=1)
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = affine_warp_paste(latent, affines, rects, mode, backend="reference")
    out = affine_warp_paste(latent.cuda(), affines, rects, mode, backend="native")
    assert torch.equal(out.cpu(), expected)
    latents = affine_warp_paste_(expected.cuda(), affines, rects, mode, backend="native")
    assert torch.equal(latents.cpu(), affine_warp_paste_(expected.clone(), affines, rects, mode, backend="reference"))
