"""Layers that store weights in 16 bits and compute in float32, which halves the memory that the weights take.

Layer 3: for processors where 16 bits are no faster. Each call widens the weight, which is exact, and frees the copy.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

LEAST = 1 << 16  # elements; a smaller weight saves too little memory to be widened at each call


class NarrowLinear(nn.Linear):
    """A linear layer that widens its weight to the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), self.bias)


class NarrowConv2d(nn.Conv2d):
    """A convolution that widens its weight to the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight.to(input.dtype), self.bias)


class NarrowConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution that widens its weight to the dtype of its input."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        assert isinstance(self.padding, tuple) and output_size is None
        return F.conv_transpose2d(input, self.weight.to(input.dtype), self.bias, self.stride, self.padding,
                                  self.output_padding, self.groups, self.dilation)  # fmt: skip


_NARROW: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: NarrowLinear, nn.Conv2d: NarrowConv2d, nn.ConvTranspose2d: NarrowConvTranspose2d,
}  # fmt: skip


def keep_narrow(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make the large linear layers and convolutions of `module` keep their weights in 16 bits, in place.

    Args: weights: by parameter name, in 16 bits.
    Returns: the weights that `module` now takes: those of these layers unchanged, other floating-point ones float32.
    """
    narrow = set()
    for name, layer in module.named_modules():
        if type(layer) in _NARROW and weights[f"{name}.weight"].numel() >= LEAST:
            layer.__class__ = _NARROW[type(layer)]
            narrow.add(f"{name}.weight")
    return {name: tensor.float() if tensor.is_floating_point() and name not in narrow else tensor
            for name, tensor in weights.items()}  # fmt: skip
