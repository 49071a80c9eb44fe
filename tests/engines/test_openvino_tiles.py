"""Products in eight bits by the processor's tiles against those by its vectors: sums are whole numbers, so every bit is the same.

Tests of posecrafter_rt/engines/operations/tiles.h. What the sums are of, tests/engines/test_openvino_bytes.py says.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import openvino
import pytest
import torch
from torch import Tensor

from posecrafter_rt.engines import openvino_operations as operations
from posecrafter_rt.engines.openvino_attention import use_attention
from posecrafter_rt.engines.openvino_convolutions import use_convolutions
from posecrafter_rt.engines.openvino_linear import use_linear
from posecrafter_rt.machine import cpu_features
from tests.engines.openvino_models import LAYOUTS, convolved, doubled, draw, layers, of_three_frames, parameter, run

NO_TILES = Path(__file__).parents[1] / "native" / "no_tiles.h"
TILES = {"amx_tile", "amx_int8", "amx_bf16"}  # what a processor that has them says
# A process in which seccomp answers arch_prctl(ARCH_REQ_XCOMP_PERM, …) with EPERM, as a sandbox may.
REFUSED = """
import ctypes, struct
rules = [(0x20, 0, 0, 0), (0x15, 0, 3, 158), (0x20, 0, 0, 16), (0x15, 0, 1, 0x1023), (6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000)]
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("rules", ctypes.c_char_p)]
program = Program(len(rules), b"".join(struct.pack("HBBI", *rule) for rule in rules))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0  # PR_SET_NO_NEW_PRIVS, _SECCOMP
from posecrafter_rt.engines import openvino_operations as operations
from posecrafter_rt.machine import cpu_features
found = operations.operations("fp16")
print(*(flag for flag in cpu_features() if flag.startswith("amx")))
print(found.vectors.has_vnni, found.vectors.has_tiles, operations.network_precision("vae_decoder", "fp16"))
"""
DEPTHS = (32, 36, 40, 44, 48, 64, 72, 96, 160, 192, 320)  # of rows; 72 is two tiles of 36, of 44 there is one


@pytest.fixture
def both(byte_operation: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Asserts that a model, made anew for each, gives the same by tiles and by vectors; skips where there are no tiles.

    Both are compiled for the same processor, or what is in float32 might be rounded otherwise: the second as where the system
    does not let it use tiles, and it ends if it does.
    """
    if not cpu_features() >= TILES:
        pytest.skip("this processor has no tiles")
    if operations.left_out() is not None:
        pytest.skip(f"the compiler here does not know them: {operations.left_out()}")

    tiled = operations.VECTORS[0]
    refused = tiled._replace(flags=(*tiled.flags, "-include", str(NO_TILES)))

    def compare(make: Callable[[], openvino.Model], *inputs: Tensor) -> None:
        found = []
        for vectors in (tiled, refused):
            monkeypatch.setattr(operations, "VECTORS", (vectors,))
            available, model = operations.operations("int8"), make()
            assert available is not None and available.vectors == vectors
            assert use_attention(model, "int8") + use_convolutions(model, "int8") + use_linear(model, "int8") > 0
            found.append(run(model, *inputs))
        assert all(map(torch.equal, *found))

    return compare


@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_maps_of_any_depth(layout: str, both: Callable[..., None]) -> None:
    for depth in DEPTHS:
        _, inputs, _ = layers(layout, (2, (5, 7), depth, 1), lanes=16)
        both(lambda depth=depth: layers(layout, (2, (5, 7), depth, 1), lanes=16)[0], *inputs)


def test_any_number_of_tokens(both: Callable[..., None]) -> None:
    """Groups of rows of every height, and the last ones with rows of those before."""
    for tokens in (*range(1, 36), 63, 64, 65, 97, 168, 169, 337):
        _, inputs, _ = layers("product", (1, (1, tokens), 64, 2), lanes=16)
        both(lambda tokens=tokens: layers("product", (1, (1, tokens), 64, 2), lanes=16)[0], *inputs)


@pytest.mark.parametrize("size", [(1, 1), (3, 4), (5, 17), (4, 33), (2, 66)])
@pytest.mark.parametrize("channels", [16, 32, 48, 64])
def test_convolutions(channels: int, size: tuple[int, int], both: Callable[..., None]) -> None:
    """Plain, halved, and of a doubled picture."""
    pixels, weight, bias = draw(3, channels, *size), draw(64, channels, 3, 3, seed=1), draw(64, seed=2)
    turned = draw(channels, 64, 4, 4, seed=3)

    def make() -> openvino.Model:
        given = parameter(pixels)
        kinds = [convolved(given, weight, bias), convolved(given, weight, bias, stride=2), doubled(given, turned, bias)]
        return openvino.Model(kinds, [given])

    both(make, pixels)


def test_a_network(openvino_networks: Path, both: Callable[..., None]) -> None:
    """With attention of every kind."""
    given = [
        draw(*tensor.shape, seed=seed) for seed, tensor in enumerate(of_three_frames(openvino_networks, "unet").inputs)
    ]
    both(lambda: of_three_frames(openvino_networks, "unet"), *given)


def test_where_the_system_refuses_tiles_vectors_do_their_work(both: Callable[..., None]) -> None:
    """In 16 bits, too, of the autoencoder among others."""
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.returncode) == ("\nTrue False fp16\n", 0), done.stderr
