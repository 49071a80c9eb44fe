"""The attentions' bodies in standard operators against the reference, in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from posecrafter_rt.export.functions import DOMAIN, DOMAIN_VERSION, OPSET, function_protos, translation_table
from posecrafter_rt.ops.reference import keyframe_attention_ref, temporal_attention_ref

TYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bool: TensorProto.BOOL}


def run(name: str, heads: int, **inputs: Tensor) -> Tensor:
    """One node of ours, every dimension dynamic. inputs: q, k, v and perhaps a mask."""
    node = helper.make_node(name, list(inputs), ["out"], domain=DOMAIN, heads=heads)
    tensors = {**inputs, "out": inputs["q"]}
    values = [helper.make_tensor_value_info(value, TYPES[tensor.dtype], [None] * tensor.dim())
              for value, tensor in tensors.items()]  # fmt: skip
    graph = helper.make_graph([node], "one", values[:-1], values[-1:])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, functions=function_protos(), ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {value: tensor.numpy() for value, tensor in inputs.items()})[0])


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(np.prod(shape)))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("groups", "frames", "tokens", "key_tokens"), [(1, 1, 1, 1), (1, 7, 31, 31), (2, 3, 97, 77)])
def test_keyframe_attention(dtype: torch.dtype, groups: int, frames: int, tokens: int, key_tokens: int) -> None:
    q = draw(groups * frames, tokens, 40, dtype=dtype)
    k, v = draw(groups, key_tokens, 40, dtype=dtype), draw(groups, key_tokens, 40, dtype=dtype) + 1
    expected = keyframe_attention_ref(q.float(), k.float(), v.float(), 4)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(run("KeyframeAttention", 4, q=q, k=k, v=v).float(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("groups", "queries", "keys", "tokens"), [(1, 1, 1, 1), (1, 16, 16, 31), (2, 1, 5, 9)])
def test_temporal_attention(groups: int, queries: int, keys: int, tokens: int) -> None:
    q, k, v = draw(groups, queries, tokens, 32), draw(groups, keys, tokens, 32), draw(groups, keys, tokens, 32) + 1
    expected = temporal_attention_ref(q, k, v, 2)
    torch.testing.assert_close(run("TemporalAttention", 2, q=q, k=k, v=v), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("groups", "queries", "keys", "tokens"), [(1, 1, 1, 1), (4, 1, 10, 31), (2, 3, 5, 9)])
def test_masked_temporal_attention(dtype: torch.dtype, groups: int, queries: int, keys: int, tokens: int) -> None:
    q, k, v = (draw(groups, frames, tokens, 32, dtype=dtype) for frames in (queries, keys, keys))
    mask = torch.rand(groups, queries, keys, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., -1] = True
    expected = temporal_attention_ref(q.float(), k.float(), v.float(), 2, mask)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    found = run("MaskedTemporalAttention", 2, q=q, k=k, v=v, mask=mask)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the exporter's own
def test_every_operator_of_ours_is_translated() -> None:
    class Both(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            out = torch.ops.posecrafter.keyframe_attention(q, q[:1], q[:1], 2)
            out = torch.ops.posecrafter.temporal_attention(q[None], q[None], out[None], 2, None)
            mask = torch.ones_like(q[:1, :1, :1], dtype=torch.bool).expand(1, 3, 3)
            return torch.ops.posecrafter.temporal_attention(q[None], q[None], out, 2, mask)

    program = torch.onnx.export(
        torch.export.export(Both().eval(), (draw(3, 5, 8),)),
        dynamo=True,
        opset_version=OPSET,
        custom_translation_table=translation_table(),
        verbose=False,
    )
    assert program is not None
    assert [node.op_type for node in program.model.graph if node.domain == DOMAIN] == [
        "KeyframeAttention", "TemporalAttention", "MaskedTemporalAttention"]  # fmt: skip


def test_a_mask_that_all_groups_share_is_refused_rather_than_misread() -> None:
    translate = translation_table()[torch.ops.posecrafter.temporal_attention.default]
    with pytest.raises(NotImplementedError, match="mask"):
        translate(None, None, None, heads=2, mask=ir.Value(shape=ir.Shape([3, 3])))
