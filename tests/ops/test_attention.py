"""The attentions' references against the written-out formula, and how tracing sees the operators.

Tests of posecrafter_rt/ops/keyframe_attention.py, temporal_attention.py, reference.py and dispatch.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import posecrafter_rt.ops.traced  # noqa: F401  (registers torch.ops.posecrafter)
from posecrafter_rt.errors import BackendUnavailable, ShapeError
from posecrafter_rt.ops import keyframe_attention, temporal_attention

# error ≤ 2 × the error of the same formula in the dtype, plus this
FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(…, n, d) attention by its formula, masked rows without a key giving 0."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).nan_to_num() @ v


def keyframe_formula(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Eq. 1 frame by frame and head by head, K and V expanded."""
    frames_per_group = q.shape[0] // k.shape[0]
    k, v = (tensor.repeat_interleave(frames_per_group, 0) for tensor in (k, v))
    parts = [softmax_attention(*(t.chunk(heads, -1)[head] for t in (q, k, v))) for head in range(heads)]
    return torch.cat(parts, -1)


def temporal_formula(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Eq. 2 with frames moved last."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    parts = [softmax_attention(*(t.chunk(heads, -1)[head] for t in (q, k, v)), mask) for head in range(heads)]
    return torch.cat(parts, -1).transpose(1, 2)


def window_mask(frames: int, window: int) -> Tensor:
    """Streaming's mask: key 0 is the anchor; frame i sees it, itself and the `window` frames before."""
    age = torch.arange(frames)[:, None] - torch.arange(frames)
    keep = (age >= 0) & (age <= window)
    return torch.cat([torch.ones(frames, 1, dtype=torch.bool), keep], 1)


def assert_close(out: Tensor, exact: Tensor, eager: Tensor) -> None:
    allowed = 2 * (eager.double() - exact).abs().max() + FLOOR[out.dtype]
    assert (out.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 8), (2, 3, 31, 31, 2, 40), (1, 5, 97, 77, 1, 80), (2, 2, 16, 257, 1, 160)], ids=str
)
def test_keyframe_attention(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    groups, frames, tokens, keys, heads, head_size = shape
    channels = heads * head_size
    q = normal(groups * frames, tokens, channels, seed=0, dtype=dtype)
    k, v = normal(groups, keys, 2 * channels, seed=1, dtype=dtype).chunk(2, -1)
    exact = keyframe_formula(q.double(), k.double(), v.double(), heads)
    out = keyframe_attention(q, k, v, heads)
    assert out.dtype == dtype and out.is_contiguous()
    assert_close(out, exact, keyframe_formula(q, k, v, heads))


@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 8, 0), (2, 9, 31, 2, 40, 3), (1, 31, 7, 1, 80, 5), (1, 101, 3, 1, 24, 8)], ids=str
)
@pytest.mark.parametrize("is_masked", [False, True])
def test_temporal_attention(shape: tuple[int, ...], dtype: torch.dtype, is_masked: bool) -> None:
    groups, frames, tokens, heads, head_size, window = shape
    channels = heads * head_size
    q = normal(groups, frames, tokens, channels, seed=2, dtype=dtype)
    k, v = normal(groups, frames + is_masked, tokens, 2 * channels, seed=3, dtype=dtype).chunk(2, -1)
    mask = window_mask(frames, window) if is_masked else None
    exact = temporal_formula(q.double(), k.double(), v.double(), heads, mask)
    out = temporal_attention(q, k, v, heads, mask)
    assert out.dtype == dtype and out.is_contiguous()
    assert_close(out, exact, temporal_formula(q, k, v, heads, mask))


@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
def test_groups_may_have_masks_of_their_own(dtype: torch.dtype) -> None:
    q = normal(3, 2, 5, 16, seed=21, dtype=dtype)
    k, v = normal(3, 4, 5, 32, seed=22, dtype=dtype).chunk(2, -1)
    masks = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(23)) < 0.5
    masks[..., 0] = True
    out = temporal_attention(q, k, v, 2, masks)
    parts = [temporal_attention(*(t[g : g + 1] for t in (q, k, v)), 2, masks[g]) for g in range(3)]
    assert_close(out, torch.cat(parts).double(), torch.cat(parts))
    assert not torch.equal(out[1:2], temporal_attention(q[1:2], k[1:2], v[1:2], 2, masks[0]))


def test_a_query_without_keys_yields_zero() -> None:
    q, k = normal(1, 3, 2, 16, seed=4), normal(1, 4, 2, 16, seed=5)
    mask = torch.tensor([[True] * 4, [False] * 4, [False, True, False, False]])
    out = temporal_attention(q, k, k, 2, mask)
    assert torch.equal(out[:, 1], torch.zeros_like(out[:, 1]))
    torch.testing.assert_close(out[:, 2], k[:, 1])


def test_equal_frames_make_temporal_attention_the_identity_on_values() -> None:
    q, v = normal(1, 5, 7, 16, seed=6), normal(1, 1, 7, 16, seed=7).expand(1, 5, 7, 16)
    torch.testing.assert_close(temporal_attention(q, v, v, 2), v.contiguous())


@pytest.mark.parametrize("op", ["keyframe", "temporal"])
def test_gradients_flow(op: str) -> None:
    if op == "keyframe":
        q, k, v = (normal(*shape, seed=8).double().requires_grad_() for shape in ((4, 3, 8), (2, 3, 8), (2, 3, 8)))
        assert torch.autograd.gradcheck(lambda *qkv: keyframe_attention(*qkv, 2), (q, k, v))
    else:
        q, k, v = (normal(1, 3, 2, 8, seed=seed).double().requires_grad_() for seed in (9, 10, 11))
        assert torch.autograd.gradcheck(lambda *qkv: temporal_attention(*qkv, 2), (q, k, v))


@pytest.mark.parametrize("has_mask", [False, True, "groups"])
def test_opcheck(has_mask: bool | str) -> None:
    q, k = normal(4, 5, 24, seed=12), normal(2, 7, 24, seed=13)
    torch.library.opcheck(torch.ops.posecrafter.keyframe_attention.default, (q, k, k, 3))
    q, k = normal(2, 3, 5, 24, seed=14), normal(2, 4, 5, 24, seed=15)
    mask = torch.ones(3, 4, dtype=torch.bool).tril() if has_mask else None
    mask = torch.stack([mask, mask.flip(1)]) if mask is not None and has_mask == "groups" else mask
    torch.library.opcheck(torch.ops.posecrafter.temporal_attention.default, (q, k, k, 3, mask))


class Attend(torch.nn.Module):
    """Both attentions after a layer with parameters, as a network holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(16, 16)

    def forward(self, clip: Tensor) -> Tensor:
        projected = self.project(clip)
        attended = keyframe_attention(projected, projected[:1], projected[:1], 2)
        return temporal_attention(attended[None], projected[None], projected[None], 2)[0]


def op_names(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "posecrafter" in str(node.target)]


def test_aotinductor_sees_through_both(tmp_path: Path) -> None:
    module, clip = Attend().eval(), normal(4, 6, 16, seed=18)
    free = {0: torch.export.Dim("frames", min=2), 1: torch.export.Dim("tokens", min=2)}
    with torch.no_grad():
        program = torch.export.export(module, (clip,), dynamic_shapes=(free,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "attend.pt2"))
        compiled = torch._inductor.aoti_load_package(package)
        for seed, shape in ((19, (4, 6, 16)), (20, (7, 5, 16)), (21, (2, 9, 16))):
            inputs = normal(*shape, seed=seed)
            torch.testing.assert_close(compiled(inputs), module(inputs), rtol=1e-5, atol=1e-6)


def test_export_keeps_one_node_an_attention_with_free_frames_and_tokens() -> None:
    clip = normal(4, 6, 16, seed=16)
    free = {0: torch.export.Dim("frames", min=2), 1: torch.export.Dim("tokens", min=2)}
    program = torch.export.export(Attend(), (clip,), dynamic_shapes=(free,))
    for exported in (program, program.run_decompositions()):
        expected = ["posecrafter.keyframe_attention.default", "posecrafter.temporal_attention.default"]
        assert op_names(exported.graph) == expected
    longer = normal(7, 5, 16, seed=17)
    module = Attend()
    module.load_state_dict(program.state_dict)
    torch.testing.assert_close(program.module()(longer), module(longer))


def test_compilers_see_through() -> None:
    seen: list[str] = []

    def backend(graph_module: torch.fx.GraphModule, inputs: object) -> object:
        seen.extend(str(node.target) for node in graph_module.graph.nodes)
        return graph_module.forward

    from torch._dynamo.backends.common import aot_autograd

    module, clip = Attend().eval(), normal(3, 4, 16, seed=18)
    compiled = torch.compile(module, backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(clip), module(clip))
    assert not [name for name in seen if "posecrafter" in name]
    assert any("attention" in name or "softmax" in name for name in seen)


def test_under_autocast_the_dtype_is_still_that_of_q() -> None:
    q, k = normal(4, 3, 16, seed=21), normal(2, 5, 16, seed=22)
    with torch.autocast("cpu", torch.bfloat16):
        assert keyframe_attention(q, k, k, 2).dtype == temporal_attention(q[None], q[None], q[None], 2).dtype == q.dtype


@pytest.mark.parametrize("k_shape", [(4, 16), (1, 2, 4, 16), (0, 4, 16), (16,), ()])
def test_key_frames_of_other_dimensions_or_of_no_group_are_refused(k_shape: tuple[int, ...]) -> None:
    q, k = normal(8, 4, 16, seed=23), torch.zeros(k_shape)
    with pytest.raises(ShapeError, match="do not fit"):
        keyframe_attention(q, k, k, 2)


@pytest.mark.parametrize("k_shape", [(1, 4, 16), (1, 2, 2, 4, 16), (16,), ()])
def test_frames_to_attend_to_of_other_dimensions_are_refused(k_shape: tuple[int, ...]) -> None:
    q, k = normal(1, 8, 4, 16, seed=23), torch.zeros(k_shape)
    with pytest.raises(ShapeError, match="do not fit"):
        temporal_attention(q, k, k, 2)


@pytest.mark.parametrize("heads", [0, -2])
def test_less_than_one_head_is_refused(heads: int) -> None:
    q = normal(8, 4, 16, seed=24)
    with pytest.raises(ShapeError, match=f"into {heads} heads"):
        keyframe_attention(q, q, q, heads)
    with pytest.raises(ShapeError, match=f"into {heads} heads"):
        temporal_attention(q[None], q[None], q[None], heads)


def test_refusals() -> None:
    q, k = normal(3, 4, 16, seed=19), normal(2, 4, 16, seed=20)
    with pytest.raises(ShapeError, match="do not fit"):
        keyframe_attention(q, k, k, 2)
    with pytest.raises(ShapeError, match="3 heads"):
        keyframe_attention(q, k[:1], k[:1], 3)
    with pytest.raises(ShapeError, match="do not fit"):
        temporal_attention(q[None], k[None, :, :2], k[None, :, :2], 2)
    with pytest.raises(ShapeError, match="mask"):
        temporal_attention(q[None], q[None], q[None], 2, torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ShapeError, match="mask"):
        temporal_attention(q[None], q[None], q[None], 2, torch.ones(3, 3))
    with pytest.raises(ShapeError, match="mask"):
        temporal_attention(q[None], q[None], q[None], 2, torch.ones(2, 3, 3, dtype=torch.bool))
    with pytest.raises(BackendUnavailable, match="cannot run"):
        keyframe_attention(q, k[:1], k[:1], 2, backend="triton")
    with pytest.raises(BackendUnavailable, match="no backend 'cutlass'"):
        temporal_attention(q[None], q[None], q[None], 2, backend="cutlass")
