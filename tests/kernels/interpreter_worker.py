"""Runs the Triton kernels in Triton's interpreter, one JSON request a line, and answers with errors to fp64.

Helper of test_parity.py: a process of its own, since the interpreter must be on before Triton is imported.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
warnings.simplefilter("ignore")

import torch  # noqa: E402 - the variable above comes first
from torch import Tensor  # noqa: E402

from posecrafter_rt.kernels import group_norm, keyframe_attention, temporal_attention  # noqa: E402
from posecrafter_rt.kernels.configs import NormConfig, TemporalConfig, TileConfig  # noqa: E402
from posecrafter_rt.ops.reference import group_norm_ref, keyframe_attention_ref, temporal_attention_ref  # noqa: E402


def normal(request: dict[str, Any], seed: int, *shape: int) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(getattr(torch, request["dtype"]))


def exact(request: dict[str, Any], tensor: Tensor) -> Tensor:
    """What the kernel is given: the interpreter multiplies bf16 wrongly, so such values run as fp32."""
    return tensor.float() if request["dtype"] == "bfloat16" else tensor


def keyframe(request: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    groups, frames, tokens, keys = (request[name] for name in ("groups", "frames", "tokens", "keys"))
    channels = request["heads"] * request["head_size"]
    q = normal(request, 0, groups * frames, tokens, channels)
    k, v = normal(request, 1, groups, keys, 2 * channels).chunk(2, -1)  # rows of a fused projection
    if request["is_q_strided"]:
        q = torch.cat([q, q], -1)[..., :channels]
    inputs = [exact(request, tensor) for tensor in (q, k, v)]
    out = keyframe_attention.launch(*inputs, request["heads"], config=TileConfig(*request["config"]))
    doubles = [tensor.double() for tensor in (q, k, v)]
    return out, keyframe_attention_ref(*doubles, request["heads"]), keyframe_attention_ref(q, k, v, request["heads"])


def temporal(request: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    groups, queries, keys, tokens = (request[name] for name in ("groups", "frames", "keys", "tokens"))
    heads, channels = request["heads"], request["heads"] * request["head_size"]
    q = normal(request, 0, groups, queries, tokens, channels)
    k, v = normal(request, 1, groups, keys, tokens, 2 * channels).chunk(2, -1)
    mask = None
    if request["mask"] == "window":  # streaming: key 0 is the anchor, then a causal window of 3
        age = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
        mask = (age >= 0) & (age <= 3)
        mask[:, 0] = True
    if request["mask"] == "holes":
        mask = torch.rand(queries, keys, generator=torch.Generator().manual_seed(2)) > 0.5
        mask[0] = False
    if request["mask"] == "groups":  # a pipelined stream: each group has its own window
        mask = torch.rand(groups, queries, keys, generator=torch.Generator().manual_seed(3)) > 0.5
        mask[..., -1] = True
    inputs = [exact(request, tensor) for tensor in (q, k, v)]
    out = temporal_attention.launch(*inputs, heads, mask, config=TemporalConfig(*request["config"]))
    doubles = [tensor.double() for tensor in (q, k, v)]
    return out, temporal_attention_ref(*doubles, heads, mask), temporal_attention_ref(q, k, v, heads, mask)


def norm(request: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    channels, groups, silu = request["channels"], request["groups"], request["silu"]
    x = normal(request, 0, request["frames"], channels, *request["size"]) + request["mean"]
    x = x.to(memory_format=torch.channels_last)
    weight, bias = normal(request, 1, 2, channels)
    inputs = [exact(request, tensor) for tensor in (x, weight, bias)]
    config = NormConfig(*request["config"]) if request["config"] else None
    out = group_norm.launch(inputs[0], groups, *inputs[1:], 1e-5, silu=silu, config=config)
    exactly = group_norm_ref(x.double(), groups, weight.double(), bias.double(), 1e-5, silu)
    eager = group_norm_ref(x, groups, weight, bias, 1e-5, silu)
    out, exactly, eager = (tensor.permute(0, 2, 3, 1) for tensor in (out, exactly, eager))
    return out, exactly, eager  # channels last: as the kernel is to write them


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        out, oracle, eager = {"keyframe": keyframe, "temporal": temporal, "norm": norm}[request["op"]](request)
        out = out.to(eager.dtype)
        answer = {
            "error": (out.double() - oracle).abs().max().item(),
            "eager_error": (eager.double() - oracle).abs().max().item(),
            "is_contiguous": out.is_contiguous(),
            "is_finite": bool(out.isfinite().all()),
        }
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
