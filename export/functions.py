"""The two attentions as nodes of our own domain with model-local bodies.

Layer 4: a runtime that knows `posecrafter::KeyframeAttention` and `posecrafter::TemporalAttention` uses its kernels.
Any other inlines the bodies, which are the reference arithmetic in standard operators.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import onnx
import onnx.defs
import onnx.parser
import onnx_ir as ir
import onnxscript
import torch

import posecrafter_rt.ops.traced  # noqa: F401  (registers torch.ops.posecrafter)

DOMAIN, DOMAIN_VERSION = "posecrafter", 1
OPSET = 20  # of the exported graphs; a model-local function must be written for the opset of its model

# Shared by both: heads and channels per head as 1-D tensors, scores of (…, H, Lq, d) queries, mixed values.
_SPLIT = """
  heads = Constant <value_int: int = @heads> ()
  one = Constant <value_ints: ints = [1]> ()
  rest = Constant <value_ints: ints = [-1]> ()
  num_heads = Reshape (heads, one)
  head_dim = Div (channels, num_heads)"""
_ATTEND = """
  q_heads = Transpose <perm: ints = [0, 2, 1, 3]> (q_split)
  k_heads = Transpose <perm: ints = [0, 2, 3, 1]> (k_split)
  v_heads = Transpose <perm: ints = [0, 2, 1, 3]> (v_split)
  head_dim_q = CastLike (head_dim, q)
  root = Sqrt (head_dim_q)
  scores = MatMul (q_heads, k_heads)
  scaled = Div (scores, root)
  weights = Softmax <axis: int = -1> (scaled)
  mixed = MatMul (weights, v_heads)
  joined = Transpose <perm: ints = [0, 2, 1, 3]> (mixed)"""

# q (G·F, L, C), k and v (G, L', C): each group's frames are one long query sequence over its key frame.
_KEYFRAME = f"""
<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">
KeyframeAttention <heads> (q, k, v) => (out)
{{
  groups = Shape <start: int = 0, end: int = 1> (k)
  channels = Shape <start: int = 2, end: int = 3> (q)
{_SPLIT}
  split = Concat <axis: int = 0> (groups, rest, num_heads, head_dim)
  q_split = Reshape (q, split)
  k_split = Reshape (k, split)
  v_split = Reshape (v, split)
{_ATTEND}
  shape = Shape (q)
  out = Reshape (joined, shape)
}}"""

# q (G, Fq, L, C), k and v (G, Fk, L, C): positions become the batch, frames the sequence.
_TEMPORAL = f"""
<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">
TemporalAttention <heads> (q, k, v) => (out)
{{
  groups = Shape <start: int = 0, end: int = 1> (q)
  frames = Shape <start: int = 1, end: int = 2> (q)
  tokens = Shape <start: int = 2, end: int = 3> (q)
  channels = Shape <start: int = 3, end: int = 4> (q)
{_SPLIT}
  positions = Mul (groups, tokens)
  split = Concat <axis: int = 0> (positions, rest, num_heads, head_dim)
  q_positions = Transpose <perm: ints = [0, 2, 1, 3]> (q)
  k_positions = Transpose <perm: ints = [0, 2, 1, 3]> (k)
  v_positions = Transpose <perm: ints = [0, 2, 1, 3]> (v)
  q_split = Reshape (q_positions, split)
  k_split = Reshape (k_positions, split)
  v_split = Reshape (v_positions, split)
{_ATTEND}
  shape = Concat <axis: int = 0> (groups, tokens, frames, channels)
  out_positions = Reshape (joined, shape)
  out = Transpose <perm: ints = [0, 2, 1, 3]> (out_positions)
}}"""


# The same with a mask (G, Fq, Fk), for streams: at each position and head there is one query for a few keys, which is
# too little for a matrix product. Sums are in float32, because 16 bits cannot hold every q·k. Masked keys get -1e30.
_MASKED_TEMPORAL = f"""
<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">
MaskedTemporalAttention <heads> (q, k, v, mask) => (out)
{{
  channels = Shape <start: int = 3, end: int = 4> (q)
{_SPLIT}
  zero = Constant <value_ints: ints = [0]> ()
  split = Concat <axis: int = 0> (zero, zero, rest, head_dim)
  after_groups = Constant <value_ints: ints = [1]> ()
  after_queries = Constant <value_ints: ints = [2]> ()
  q_split = Reshape (q, split)
  k_split = Reshape (k, split)
  v_split = Reshape (v, split)
  q_rows = Unsqueeze (q_split, after_queries)
  k_rows = Unsqueeze (k_split, after_groups)
  v_rows = Unsqueeze (v_split, after_groups)
  q_wide = Cast <to: int = 1> (q_rows)
  k_wide = Cast <to: int = 1> (k_rows)
  products = Mul (q_wide, k_wide)
  scores = ReduceSum <keepdims: int = 1> (products, rest)
  head_dim_wide = Cast <to: int = 1> (head_dim)
  root = Sqrt (head_dim_wide)
  scaled = Div (scores, root)
  lowest = Constant <value_float: float = -1e30> ()
  last = Constant <value_ints: ints = [3, 4]> ()
  allowed = Unsqueeze (mask, last)
  masked = Where (allowed, scaled, lowest)
  weights = Softmax <axis: int = 2> (masked)
  v_wide = Cast <to: int = 1> (v_rows)
  weighted = Mul (weights, v_wide)
  mixed = ReduceSum <keepdims: int = 0> (weighted, after_queries)
  narrow = CastLike (mixed, q)
  shape = Shape (q)
  out = Reshape (narrow, shape)
}}"""


@cache
def function_protos() -> tuple[onnx.FunctionProto, ...]:
    """Return the parsed bodies."""
    return tuple(onnx.parser.parse_function(text) for text in (_KEYFRAME, _TEMPORAL, _MASKED_TEMPORAL))


def add_functions(model: ir.Model) -> None:
    """Add to a model, in place, the bodies of those of our nodes that it uses."""
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for proto in function_protos():
        if proto.name in used:
            function = ir.serde.deserialize_function(proto)
            model.functions[function.identifier()] = function
    if used:
        model.opset_imports[DOMAIN] = DOMAIN_VERSION


@cache
def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return how torch.onnx.export translates `torch.ops.posecrafter.*`: to one node each, without decomposition."""
    keyframe, temporal = _node_type("KeyframeAttention"), _node_type("TemporalAttention")
    masked_temporal = _node_type("MaskedTemporalAttention", has_mask=True)

    def translate_keyframe(q: ir.Value, k: ir.Value, v: ir.Value, heads: int) -> ir.Value:
        return keyframe(q, k, v, heads=heads)

    def translate_temporal(q: ir.Value, k: ir.Value, v: ir.Value, heads: int, mask: Any = None) -> ir.Value:
        if mask is None:
            return temporal(q, k, v, heads=heads)
        if mask.shape is None or len(mask.shape) != 3:
            raise NotImplementedError(f"temporal attention with a mask of shape {mask.shape} has no ONNX form")
        return masked_temporal(q, k, v, mask, heads=heads)

    return {
        torch.ops.posecrafter.keyframe_attention.default: translate_keyframe,
        torch.ops.posecrafter.temporal_attention.default: translate_temporal,
    }


def _node_type(name: str, has_mask: bool = False) -> onnxscript.values.Op:
    schema = onnx.defs.OpSchema
    masks = [schema.FormalParameter("mask", "tensor(bool)")] if has_mask else []
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    return onnxscript.values.Op(
        onnxscript.values.Opset(DOMAIN, DOMAIN_VERSION),
        name,
        op_schema=schema(
            name,
            DOMAIN,
            DOMAIN_VERSION,
            inputs=[*(schema.FormalParameter(parameter, "T") for parameter in "qkv"), *masks],
            outputs=[schema.FormalParameter("out", "T")],
            type_constraints=[("T", floats, "")],
            attributes=[schema.Attribute("heads", schema.AttrType.INT, "number of heads", required=True)],
        ),
    )
