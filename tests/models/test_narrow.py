"""Weights that stay narrow: which ones do, and that each kind of layer computes as if they had been widened.

Tests of posecrafter_rt/models/narrow.py; what a whole engine of them gives is held by tests/engines/test_torch.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from posecrafter_rt.models import narrow
from posecrafter_rt.models.narrow import NarrowConv2d, NarrowConvTranspose2d, NarrowLinear, keep_narrow

# A layer of each kind, with what of its settings its forward reads, a picture or tokens for it, and what it becomes.
LAYERS = [
    (nn.Linear(6, 5), (2, 3, 6), NarrowLinear),
    (nn.Linear(6, 5, bias=False), (2, 3, 6), NarrowLinear),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (2, 4, 9, 7), NarrowConv2d),
    (nn.Conv2d(4, 4, 3, padding=2, padding_mode="circular", bias=False), (2, 4, 5, 6), NarrowConv2d),
    (nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1), (2, 4, 5, 3), NarrowConvTranspose2d),
    (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, bias=False, dilation=2), (2, 4, 5, 3), NarrowConvTranspose2d),
]


def narrowed(module: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of a module that holds its weights as `keep_narrow` gives them, and those given to it, of a 16-bit type."""
    given = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor
             for name, tensor in module.state_dict().items()}  # fmt: skip
    module = copy.deepcopy(module)
    module.load_state_dict(keep_narrow(module, given), assign=True)
    return module, given


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("layer", "shape", "kind"), LAYERS)
@torch.no_grad()
def test_a_layer_computes_in_its_inputs_type_on_weights_that_stay_narrow(
    monkeypatch: pytest.MonkeyPatch, layer: nn.Module, shape: tuple[int, ...], kind: type[nn.Module], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(narrow, "LEAST", 0)
    found, given = narrowed(nn.Sequential(layer), dtype)
    wide = copy.deepcopy(nn.Sequential(layer))
    wide.load_state_dict({name: tensor.float() for name, tensor in given.items()})
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert type(found[0]) is kind
    for _ in range(2):  # nothing that was widened has stayed
        outputs = found(inputs)
        assert outputs.dtype == torch.float32 and torch.equal(outputs, wide(inputs))
        assert found[0].weight.dtype == dtype and torch.equal(found[0].weight, given["0.weight"])
    assert layer.bias is None or found[0].bias.dtype == torch.float32


class Others(nn.Module):
    """What is not to be narrow, beside what is: norms, other kinds of layers, a counter, one layer under its limit."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Linear(8, 8), nn.Linear(8, 7)
        self.norm, self.line = nn.GroupNorm(2, 64), nn.Conv1d(8, 8, 1)
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 1))
        self.register_buffer("count", torch.tensor(3))


def test_only_large_weights_of_those_layers_stay_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "LEAST", 64)
    module, given = narrowed(Others(), torch.float16)
    held = module.state_dict()
    stay_narrow = {name for name, tensor in held.items() if tensor.dtype == torch.float16}
    assert stay_narrow == {"large.weight", "inner.0.weight"} and held["count"].dtype == torch.int64
    assert all(torch.equal(tensor, given[name].to(tensor.dtype)) for name, tensor in held.items())
    kinds = [type(layer) for layer in (module.large, module.small, module.norm, module.line, module.inner[0])]
    assert kinds == [NarrowLinear, nn.Linear, nn.GroupNorm, nn.Conv1d, NarrowConv2d]


def test_a_layer_of_another_class_keeps_its_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class derived from one of the three may do more than it: its weight is widened."""

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    monkeypatch.setattr(narrow, "LEAST", 0)
    module, given = narrowed(nn.Sequential(Doubled(3, 2)), torch.bfloat16)
    assert type(module[0]) is Doubled and module[0].weight.dtype == torch.float32
    assert torch.equal(module[0].weight, given["0.weight"].float())
