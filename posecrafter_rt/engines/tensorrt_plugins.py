"""The two attentions as TensorRT plugins whose kernels are compiled while the engine is built: no Python runs later.

Layer 4: launch parameters are pure functions of dimensions; only `register_plugins` needs TensorRT. No postponed
annotations here: TensorRT reads those of the registered functions and must find types, not text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import GenericAlias
from typing import Any

from posecrafter_rt.engines.tensorrt_common import note_error, torch_dtype

NAMESPACE = "posecrafter"
PLUGIN_OPS = {"KeyframeAttention": "keyframe_attention", "TemporalAttention": "temporal_attention"}
MAX_ELEMENTS = 2**31 - 1  # of one group, whose stride is a 32-bit argument

Dim = Any  # an int, or TensorRT's symbolic expression: both know +, * and // with an int on the right
CeilDiv = Callable[[Any, int], Any]


@dataclass(frozen=True)
class Launch:
    """One kernel launch. grid: x, y, z; integers: by the kernel's argument names, in the kernel's order."""

    grid: tuple[Dim, Dim, Dim]
    integers: dict[str, Dim]


def keyframe_launch(q: Sequence[Dim], k: Sequence[Dim], heads: int, block_m: int, cdiv: CeilDiv) -> Launch:
    """Return the launch of key-frame attention. q: (G·F, L, C); k and v: (G, L', C), all contiguous."""
    channels, groups = q[2], k[0]
    num_rows = q[0] // groups * q[1]
    group_stride = k[1] * channels
    integers = {
        "num_rows": num_rows, "num_keys": k[1], "q_row_stride": channels, "k_row_stride": channels,
        "v_row_stride": channels, "k_group_stride": group_stride, "v_group_stride": group_stride, "channels": channels,
    }  # fmt: skip
    return Launch((cdiv(num_rows, block_m), heads, groups), integers)


def temporal_launch(q: Sequence[Dim], k: Sequence[Dim], heads: int, blocks: tuple[int, int], cdiv: CeilDiv) -> Launch:
    """Return the launch of temporal attention. q: (G, Fq, L, C); k and v: (G, Fk, L, C), all contiguous.

    blocks: query frames and positions per tile.
    """
    groups, num_queries, tokens, channels = q
    frame_stride = tokens * channels
    integers = {
        "num_queries": num_queries, "num_keys": k[1], "tokens": tokens,
        "q_group_stride": num_queries * frame_stride, "q_frame_stride": frame_stride, "q_row_stride": channels,
        "k_group_stride": k[1] * frame_stride, "k_frame_stride": frame_stride, "k_row_stride": channels,
        "channels": channels,
    }  # fmt: skip
    block_q, block_p = blocks
    return Launch((cdiv(num_queries, block_q) * heads, cdiv(tokens, block_p), groups), integers)


def launch_parameters(op: str, q: Sequence[Dim], k: Sequence[Dim], heads: int, tile: Any, cdiv: CeilDiv) -> Launch:
    """Return the launch of an operator with a tile of `kernels.configs`."""
    if op == "keyframe_attention":
        return keyframe_launch(q, k, heads, tile.block_m, cdiv)
    return temporal_launch(q, k, heads, (tile.block_q, tile.block_p), cdiv)


def typical_frames(op: str, q: Sequence[int]) -> int:
    """Return the frames that a temporal tile is chosen for: the profile's optimum; 1 for key-frame attention."""
    return q[1] if op == "temporal_attention" else 1


def check_size(op: str, largest: Sequence[int]) -> None:
    """Raise ValueError if the largest q or k (of temporal attention, a group of it) is too large for 32-bit strides."""
    elements = 1
    for length in largest if op == "keyframe_attention" else largest[1:]:
        elements *= length
    if elements > MAX_ELEMENTS:
        raise ValueError(f"{op}: {tuple(largest)} is too large; build for fewer frames or a smaller size")


@cache
def register_plugins(capability: tuple[int, int]) -> None:
    """Register the plugins with TensorRT's builder, for devices of this compute capability; once per process.

    Raises: ValueError from TensorRT for another capability in the same process.
    """
    import tensorrt.plugin as trtp

    for name, op in PLUGIN_OPS.items():
        _register(trtp, f"{NAMESPACE}::{name}", op, capability)


def _register(trtp: Any, plugin_id: str, op: str, capability: tuple[int, int]) -> None:
    def describe(q: Any, k: Any, v: Any, heads: int) -> Any:
        return q.like()

    def compile_ahead(q: Any, k: Any, v: Any, heads: int, outputs: Any, tactic: int) -> Any:
        try:
            return ahead_of_time(trtp, op, capability, (q, k), heads)
        except Exception as error:
            note_error(f"{plugin_id}: {error}")  # TensorRT prints it and says only that the build has failed
            raise

    inputs = dict.fromkeys("qkv", trtp.TensorDesc)
    returned = GenericAlias(tuple, (str, str, trtp.KernelLaunchParams, trtp.SymIntExprs))
    outputs = GenericAlias(tuple, (trtp.TensorDesc,))
    describe.__annotations__ |= {**inputs, "return": trtp.TensorDesc}
    compile_ahead.__annotations__ |= {**inputs, "outputs": outputs, "return": returned}
    trtp.register(plugin_id)(describe)
    trtp.aot_impl(plugin_id)(compile_ahead)


def ahead_of_time(
    trtp: Any, op: str, capability: tuple[int, int], descs: tuple[Any, Any], heads: int
) -> tuple[str, str, Any, Any]:
    """Return what `aot_impl` expects: the kernel's name, PTX, launch parameters and integer arguments.

    descs: TensorRT's descriptions of q and k, with their profiles.
    """
    from posecrafter_rt.kernels.plugins import plugin_kernel

    q, k = descs
    for desc in descs:
        check_size(op, profile_shape(desc, "max"))
    usual = profile_shape(q, "opt")  # the channels too: TensorRT may not know yet that they are the same in all shapes
    channels, frames = usual[-1], typical_frames(op, usual)
    kernel, tile = plugin_kernel(op, capability, torch_dtype(q.dtype), channels // heads, frames)
    launch = launch_parameters(op, list(q.shape_expr), list(k.shape_expr), heads, tile, trtp.cdiv)
    params = trtp.KernelLaunchParams()
    params.grid_x, params.grid_y, params.grid_z = launch.grid
    params.block_x = 32 * kernel.num_warps
    params.shared_mem = kernel.shared_bytes
    integers = trtp.SymIntExprs.from_tuple(tuple(trtp.SymInt32(value) for value in launch.integers.values()))
    return kernel.name, kernel.ptx, params, integers


def profile_shape(desc: Any, bound: str) -> tuple[int, ...]:
    """Return a tensor's shape at a bound of the profile: "opt" or "max"."""
    shape = desc.shape
    return tuple(getattr(shape, bound) if shape.is_dynamic else shape)
