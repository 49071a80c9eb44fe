"""The Triton kernels on a GPU against the references in fp64, at SD 1.5's shapes and odd ones.

Tests of kernels/keyframe_attention.py, temporal_attention.py and group_norm.py through the public operators.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from posecrafter_rt.ops import group_norm, keyframe_attention, temporal_attention, unsupported_reason
from posecrafter_rt.ops.reference import group_norm_ref, keyframe_attention_ref, temporal_attention_ref

REASON = unsupported_reason("keyframe_attention", "triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOOR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def normal(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def assert_close(out: Tensor, exact: Tensor, eager: Tensor) -> None:
    allowed = 2 * (eager.double() - exact).abs().max() + FLOOR[out.dtype]
    assert (out.double() - exact).abs().max() <= allowed


def skip_if_refused(op: str, *tensors: Tensor, heads: int) -> None:
    reason = unsupported_reason(op, "triton", *tensors, heads=heads)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 9, 1024, 1024, 8, 40),
        (2, 3, 256, 77, 8, 80),
        (1, 16, 4096, 77, 8, 40),  # text keys and so many blocks that several share a multiprocessor
        (1, 16, 1024, 77, 8, 80),
        (1, 16, 256, 77, 8, 160),
        (1, 5, 64, 64, 8, 160),
        (1, 1, 1, 1, 1, 8),
        (1, 2, 97, 31, 3, 24),
    ],
    ids=str,
)
def test_keyframe_attention(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    groups, frames, tokens, keys, heads, head_size = shape
    q = normal(groups * frames, tokens, heads * head_size, seed=0, dtype=dtype)
    k, v = normal(groups, keys, 2 * heads * head_size, seed=1, dtype=dtype).chunk(2, -1)
    skip_if_refused("keyframe_attention", q, k, v, heads=heads)
    exact = keyframe_attention_ref(q.double(), k.double(), v.double(), heads)
    out = keyframe_attention(q, k, v, heads, backend="triton")
    assert_close(out, exact, keyframe_attention_ref(q, k, v, heads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 9, 9, 1024, 8, 40),
        (2, 101, 101, 31, 8, 80),
        (1, 1, 10, 64, 8, 160),
        (1, 256, 256, 2, 1, 8),
        (1, 17, 5, 3, 1, 24),
    ],
    ids=str,
)
def test_temporal_attention(shape: tuple[int, ...], is_masked: bool, dtype: torch.dtype) -> None:
    groups, queries, keys, tokens, heads, head_size = shape
    q = normal(groups, queries, tokens, heads * head_size, seed=2, dtype=dtype)
    k, v = normal(groups, keys, tokens, 2 * heads * head_size, seed=3, dtype=dtype).chunk(2, -1)
    mask = torch.ones(queries, keys, dtype=torch.bool, device="cuda").tril() if is_masked else None
    skip_if_refused("temporal_attention", q, k, v, heads=heads)
    exact = temporal_attention_ref(q.double(), k.double(), v.double(), heads, mask)
    out = temporal_attention(q, k, v, heads, mask, backend="triton")
    assert_close(out, exact, temporal_attention_ref(q, k, v, heads, mask))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 1, 10, 1024, 8, 40), (8, 1, 18, 64, 8, 160), (3, 5, 7, 31, 8, 80)], ids=str)
def test_temporal_attention_with_a_mask_for_each_group(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    groups, queries, keys, tokens, heads, head_size = shape
    q = normal(groups, queries, tokens, heads * head_size, seed=2, dtype=dtype)
    k, v = normal(groups, keys, tokens, 2 * heads * head_size, seed=3, dtype=dtype).chunk(2, -1)
    masks = torch.rand(groups, queries, keys, generator=torch.Generator().manual_seed(4)) > 0.5
    masks[..., -1] = True
    masks = masks.cuda()
    skip_if_refused("temporal_attention", q, k, v, heads=heads)
    exact = temporal_attention_ref(q.double(), k.double(), v.double(), heads, masks)
    out = temporal_attention(q, k, v, heads, masks, backend="triton")
    assert_close(out, exact, temporal_attention_ref(q, k, v, heads, masks))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 320, 64, 64), (16, 320, 64, 64), (3, 2560, 8, 8), (2, 960, 32, 32), (1, 64, 5, 7)], ids=str
)
def test_group_norm(shape: tuple[int, ...], silu: bool, dtype: torch.dtype) -> None:
    x = (normal(*shape, seed=5, dtype=dtype) + 2).to(memory_format=torch.channels_last)
    weight, bias = normal(2, shape[1], seed=6, dtype=dtype)
    exact = group_norm_ref(x.double(), 32, weight.double(), bias.double(), 1e-5, silu)
    out = group_norm(x, 32, weight, bias, 1e-5, silu=silu, backend="triton")
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_close(out, exact, group_norm_ref(x, 32, weight, bias, 1e-5, silu))


def test_group_norm_replays_in_a_cuda_graph() -> None:
    x = normal(2, 64, 16, 16, seed=7, dtype=torch.float16).to(memory_format=torch.channels_last)
    weight, bias = normal(2, 64, seed=8, dtype=torch.float16)
    group_norm(x, 32, weight, bias, 1e-5, silu=True, backend="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = group_norm(x, 32, weight, bias, 1e-5, silu=True, backend="triton")
    x.copy_(3 * x + 1)
    graph.replay()
    assert torch.equal(out, group_norm(x, 32, weight, bias, 1e-5, silu=True, backend="triton"))


def test_group_norm_in_compiled_code_is_left_to_the_compiler() -> None:
    x = normal(1, 64, 8, 8, seed=9, dtype=torch.float32).to(memory_format=torch.channels_last)
    weight, bias = normal(2, 64, seed=10, dtype=torch.float32)

    def normalise(x: Tensor) -> Tensor:
        return group_norm(x, 32, weight, bias, 1e-5, silu=True)

    torch.testing.assert_close(torch.compile(normalise, fullgraph=True)(x), normalise(x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_kernels_run_on_the_gpu_of_their_tensors_whichever_is_current() -> None:
    q, x = (normal(2, 64, *rest, seed=5, dtype=torch.float16).to("cuda:1") for rest in ((80,), (8, 8)))
    x, weight = x.to(memory_format=torch.channels_last), torch.ones(64, device="cuda:1", dtype=torch.float16)
    with torch.cuda.device(0):
        assert_close(keyframe_attention(q, q, q, 2, backend="triton"), *(
            keyframe_attention_ref(given, given, given, 2) for given in (q.double(), q)))  # fmt: skip
        assert_close(temporal_attention(q[None], q[None], q[None], 2, backend="triton"), *(
            temporal_attention_ref(given[None], given[None], given[None], 2) for given in (q.double(), q)))  # fmt: skip
        assert_close(group_norm(x, 8, weight, weight, 1e-5, backend="triton"), *(
            group_norm_ref(given, 8, scale, scale, 1e-5, False)
            for given, scale in ((x.double(), weight.double()), (x, weight))))  # fmt: skip


@pytest.mark.parametrize("op", ["keyframe", "temporal"])
def test_compiled_code_launches_the_kernel(op: str) -> None:
    q, k = (normal(frames, 64, 80, seed=4, dtype=torch.float16) for frames in (4, 1))

    def attend(q: Tensor, k: Tensor) -> Tensor:
        if op == "keyframe":
            return keyframe_attention(q, k, k, 2) + 1
        return temporal_attention(q[None], q[None], q[None], 2) + 1

    torch.testing.assert_close(torch.compile(attend, fullgraph=True)(q, k), attend(q, k))


@pytest.mark.skipif(unsupported_reason("keyframe_attention", "xformers") is not None, reason="xformers cannot run")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_xformers_has_the_references_values_and_gradients(dtype: torch.dtype) -> None:
    q, k, v = (
        normal(batch, 96, 2 * 40, seed=seed, dtype=dtype).requires_grad_() for seed, batch in enumerate((6, 2, 2))
    )
    exact = keyframe_attention_ref(q.double(), k.double(), v.double(), 2)
    eager = keyframe_attention_ref(q, k, v, 2)
    out = keyframe_attention(q, k, v, 2)  # the first that has a gradient
    assert_close(out, exact, eager)
    weights = normal(*out.shape, seed=9, dtype=dtype)
    for ours, exactly, plainly in zip(*(torch.autograd.grad((result * weights.to(result.dtype)).sum(), (q, k, v))
                                        for result in (out, exact, eager)), strict=True):  # fmt: skip
        assert_close(ours, exactly.double(), plainly)
