"""Nearest-neighbour doubling and the 3×3 convolution after it, as one kernel.

Layer 3: torch only, because engines that hold no modules use it too.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fold_doubling(weight: Tensor) -> Tensor:
    """Return the kernel of a transposed convolution that equals doubling a picture and then convolving with `weight`.

    It is (in, out, 4, 4), for stride 2 and padding 1; `weight` is (out, in, 3, 3).
    In one dimension output 2i is w0·x[i-1] + (w1 + w2)·x[i], and output 2i + 1 is (w0 + w1)·x[i] + w2·x[i+1].
    """
    taps = weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float32)
    return torch.einsum("ay,oiyx,bx->ioab", taps, weight.float(), taps).to(weight.dtype)
