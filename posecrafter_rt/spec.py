"""Names, dimensions and element types of every network's tensors: one contract for engines and export.

Layer 0: imports the errors only; no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from posecrafter_rt.errors import ShapeError

STREAM_NETWORKS = ("controlnet_stream", "unet_stream")
SMALL_DECODER = "vae_decoder_small"  # only if the architecture has one
SHALLOW_UNET = "unet_shallow"  # only if the architecture's U-Net outputs deep features
SHALLOW_STREAM = "unet_stream_shallow"  # likewise
NETWORK_NAMES = (
    "text_encoder", "prompt_kv", "time_tables", "pose_embedding", "vae_encoder", "vae_decoder", "controlnet", "unet",
    *STREAM_NETWORKS,
)  # fmt: skip
ALL_NETWORKS = (*NETWORK_NAMES, SMALL_DECODER, SHALLOW_UNET, SHALLOW_STREAM)
# These get one frame per call.
ONE_FRAME_NETWORKS = ("pose_embedding", "vae_encoder", "vae_decoder", SMALL_DECODER, SHALLOW_STREAM)
# These run once per person, per prompt or per number of steps.
RUN_ONCE = ("text_encoder", "prompt_kv", "time_tables", "vae_encoder")
IS_REFERENCE = "is_reference"  # an input of a stream's networks
FEED_FORWARD_TOKENS = 1 << 16  # tokens that a block computes at once by default: 16 frames of 64 × 64


@dataclass(frozen=True)
class Architecture:
    """The sizes that fix every network's tensor shapes, read once from the base model.

    vae_scale_factor: pixels per latent pixel. time_widths, kv_widths: packed table widths of (U-Net, ControlNet).
    residuals: (channels, downscale) of each ControlNet down residual; mid_residual: the same for the mid residual.
    keyframe_layers: (channels, downscale) of each self-attention of (U-Net, ControlNet), in the order of the forward.
    temporal_layers: the same for each temporal attention of the U-Net.
    size: (height, width) in pixels if only one size is allowed, as in an engine; None: any size, as in a base.
    has_small_decoder: whether there is a small decoder in addition to the VAE's.
    deep_channels: channels of the deep features that the U-Net outputs with its prediction; None: it outputs none.
    max_frames: the most frames per prompt that the denoisers take in one call, counting the inserted reference; None:
        any number.
    """

    latent_channels: int
    vae_scale_factor: int
    text_tokens: int
    text_channels: int
    pose_channels: int
    time_widths: tuple[int, int]
    kv_widths: tuple[int, int]
    residuals: tuple[tuple[int, int], ...]
    mid_residual: tuple[int, int]
    keyframe_layers: tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]
    temporal_layers: tuple[tuple[int, int], ...]
    size: tuple[int, int] | None = None
    has_small_decoder: bool = False
    deep_channels: int | None = None
    max_frames: int | None = None

    @property
    def size_multiple(self) -> int:
        """The number that height and width in pixels must be multiples of, so that every U-Net level halves evenly."""
        return self.vae_scale_factor * max(scale for _, scale in self.residuals)

    def check_size(self, size: Sequence[int]) -> None:
        """Raise ShapeError for a (height, width) in pixels that the U-Net cannot halve."""
        check_multiple(size, self.size_multiple)

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary of plain values, for a manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Architecture:
        """The inverse of `to_json`."""

        def frozen(value: Any) -> Any:
            return tuple(frozen(item) for item in value) if isinstance(value, list | tuple) else value

        return cls(**{key: frozen(value) for key, value in data.items()})


def check_multiple(size: Sequence[int], multiple: int) -> None:
    """Raise ShapeError unless height and width are multiples of a number, `Architecture.size_multiple`."""
    if any(side % multiple for side in size):
        raise ShapeError(f"size {size[0]}x{size[1]} does not fit the network", f"use multiples of {multiple}")


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor. dims: an int is fixed; "frames", "groups", "steps", "window", "height/s", "width/s" are free.

    dtype: "float": float32 at the engine's boundary, whatever the engine computes in; "kept": the engine's own type,
        for what is only passed on to another network or to later calls; "int64"; or "bool".
    """

    name: str
    dims: tuple[int | str, ...]
    dtype: str = "float"


@dataclass(frozen=True)
class NetworkSpec:
    """One network's inputs and outputs, in the order of its forward."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def residual_names(num_residuals: int) -> list[str]:
    """Return the names of the ControlNet residuals: the down blocks' in order, then the mid block's."""
    return [f"down_block_residual_{index}" for index in range(num_residuals)] + ["mid_block_residual"]


def memory_names(kind: str, count: int) -> list[str]:
    """Return the names of the "keyframe" or "temporal" keys and values that a stream keeps; outputs prepend `new_`."""
    return [f"{kind}_kv_{index}" for index in range(count)]


def network_specs(arch: Architecture) -> dict[str, NetworkSpec]:
    """Return the specification of every network of a base with this architecture, by name.

    Free dimensions: `frames` (G·F), `groups` (G: prompts, or 1), `steps`, `window` (frames that a stream remembers,
    including the reference), `height` and `width` in pixels; "height/8" is the height divided by 8. Height and width
    are numbers if the architecture has a size. Floating-point tensors cross the engine's boundary as float32, except
    residuals, deep features and a stream's memory.
    """
    scale = arch.vae_scale_factor

    def sides(divisor: int) -> tuple[int | str, int | str]:
        if arch.size is not None:
            return arch.size[0] // divisor, arch.size[1] // divisor
        return ("height", "width") if divisor == 1 else (f"height/{divisor}", f"width/{divisor}")

    def image(channels: int, divisor: int) -> tuple[int | str, ...]:
        return ("frames", channels, *sides(divisor))

    def memory(kind: str, layers: Sequence[tuple[int, int]], *free: str, prefix: str = "") -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(f"{prefix}{name}", ("frames", *free, *sides(scale * down), 2 * channels), "kept")
            for name, (channels, down) in zip(memory_names(kind, len(layers)), layers, strict=True)
        )

    latents = TensorSpec("latents", image(arch.latent_channels, scale))
    pixels = image(3, 1)
    text = TensorSpec("encoder_hidden_states", ("groups", arch.text_tokens, arch.text_channels))
    time_u, time_c = arch.time_widths
    kv_u, kv_c = arch.kv_widths
    residuals = tuple(
        TensorSpec(name, image(channels, scale * down), "kept")
        for name, (channels, down) in zip(
            residual_names(len(arch.residuals)), (*arch.residuals, arch.mid_residual), strict=True
        )
    )
    pose = TensorSpec("pose_embeddings", image(arch.pose_channels, scale))

    scale_spec = TensorSpec("conditioning_scale", (1,))
    is_reference = TensorSpec(IS_REFERENCE, ("frames",), "bool")
    window_mask = TensorSpec("window_mask", ("frames", "window"), "bool")

    def tables(time: int, kv: int) -> tuple[TensorSpec, TensorSpec]:
        return (TensorSpec("time_projections", (1, time)), TensorSpec("text_kv", ("groups", arch.text_tokens, kv)))

    def stream_tables(time: int, kv: int) -> tuple[TensorSpec, TensorSpec]:
        return (TensorSpec("time_projections", ("frames", time)), TensorSpec("text_kv", (1, arch.text_tokens, kv)))

    unet_layers, controlnet_layers = arch.keyframe_layers
    predicted: tuple[TensorSpec, ...] = (TensorSpec("noise_pred", latents.dims),)
    deep = (
        () if arch.deep_channels is None else (TensorSpec("deep_features", image(arch.deep_channels, scale), "kept"),)
    )

    specs: tuple[NetworkSpec, ...] = (
        NetworkSpec("text_encoder", (TensorSpec("input_ids", ("groups", arch.text_tokens), "int64"),), (text,)),
        NetworkSpec("prompt_kv", (text,), (TensorSpec("unet_text_kv", ("groups", arch.text_tokens, kv_u)),
                                           TensorSpec("controlnet_text_kv", ("groups", arch.text_tokens, kv_c)))),
        NetworkSpec("time_tables", (TensorSpec("timesteps", ("steps",), "int64"),),
                    (TensorSpec("unet_time_projections", ("steps", time_u)),
                     TensorSpec("controlnet_time_projections", ("steps", time_c)))),
        NetworkSpec("pose_embedding", (TensorSpec("controlnet_cond", pixels),), (pose,)),
        NetworkSpec("vae_encoder", (TensorSpec("pixels", pixels),), (latents,)),
        NetworkSpec("vae_decoder", (latents,), (TensorSpec("pixels", pixels),)),
        NetworkSpec("controlnet", (latents, *tables(time_c, kv_c), pose, scale_spec), residuals),
        NetworkSpec("unet", (latents, *tables(time_u, kv_u), *residuals), predicted + deep),
        NetworkSpec("controlnet_stream",
                    (latents, *stream_tables(time_c, kv_c), pose, scale_spec, is_reference,
                     *memory("keyframe", controlnet_layers)),
                    (*residuals, *memory("keyframe", controlnet_layers, prefix="new_"))),
        NetworkSpec("unet_stream",
                    (latents, *stream_tables(time_u, kv_u), is_reference, window_mask, *residuals,
                     *memory("keyframe", unet_layers), *memory("temporal", arch.temporal_layers, "window")),
                    (*predicted, *deep, *memory("keyframe", unet_layers, prefix="new_"),
                     *memory("temporal", arch.temporal_layers, prefix="new_"))),
    )  # fmt: skip
    if arch.has_small_decoder:
        specs += (NetworkSpec(SMALL_DECODER, (latents,), (TensorSpec("pixels", pixels),)),)
    if deep:
        shallow = (*deep, residuals[0])
        attended: tuple[TensorSpec, ...] = ()
        kept: tuple[TensorSpec, ...] = ()
        if unet_layers[-1][1] == 1:  # full size, so this attention is in the U-Net's last layer, which runs here
            attended = (window_mask, memory("keyframe", unet_layers)[-1],
                        memory("temporal", arch.temporal_layers, "window")[-1])  # fmt: skip
            kept = memory("temporal", arch.temporal_layers, prefix="new_")[-1:]
        specs += (
            NetworkSpec(SHALLOW_UNET, (latents, *tables(time_u, kv_u), *shallow), predicted),
            NetworkSpec(
                SHALLOW_STREAM, (latents, *stream_tables(time_u, kv_u), *shallow, *attended), (*predicted, *kept)
            ),
        )
    return {spec.name: spec for spec in specs}
