"""The attention and paste problems of SD 1.5 at 512², and the bytes and FLOPs that each costs at least.

Bench: shared by kernels.py, fusions.py and the kernel_*.py scripts.
"""

from __future__ import annotations

from dataclasses import dataclass

HEADS = 8
LEVELS = ((4096, 320), (1024, 640), (256, 1280), (64, 1280))  # (positions, channels) of the U-Net's levels
FRAMES = (9, 101)


@dataclass(frozen=True)
class Attention:
    """One attention call. num_keys: key tokens (key-frame) or key frames (temporal)."""

    op: str
    frames: int
    tokens: int
    channels: int
    num_keys: int

    @property
    def head_size(self) -> int:
        return self.channels // HEADS

    @property
    def flops(self) -> int:
        """Count two products of 2 · d FLOPs for each query, key and head; exponentials are not counted."""
        return 4 * self.frames * self.tokens * self.num_keys * self.channels

    def num_bytes(self, element_bytes: int) -> int:
        """Count each input as read once and the output as written once."""
        queries = self.frames * self.tokens
        keys = self.num_keys if self.op == "keyframe_attention" else self.num_keys * self.tokens
        return 2 * (queries + keys) * self.channels * element_bytes


def attentions(frames: int, scale: int = 1) -> list[Attention]:
    """Return every distinct attention of one U-Net step over a clip. scale divides the positions (4: half the size)."""
    levels = [(tokens // scale, channels) for tokens, channels in LEVELS]
    keyframe = [Attention("keyframe_attention", frames, t, channels, t) for t, channels in levels]
    temporal = [Attention("temporal_attention", frames, t, channels, frames) for t, channels in levels[:3]]
    return keyframe + temporal


def paste_bytes(frames: int, channels: int, pixels: int, pasted: int, element_bytes: int) -> int:
    """Count affine_warp_paste: all frames written once, the source read once, four taps read per pasted element."""
    return ((frames + 1) * channels * pixels + channels * pixels + 4 * pasted * channels) * element_bytes
