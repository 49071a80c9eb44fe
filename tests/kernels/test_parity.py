"""The Triton kernels in Triton's interpreter against the references, over odd, prime, single and large shapes.

Tests of kernels/keyframe_attention.py, temporal_attention.py, tiles.py and group_norm.py. bfloat16 runs upcast, since the
interpreter's bfloat16 products are wrong (a known upstream fault), and is slow: loads, shapes and masks are the other types'.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(find_spec("posecrafter_rt.kernels") is None, reason="the package is not installed")

# error to fp64 ≤ 2 × the eager reference's in the same dtype, plus this
FLOOR = {"float32": 1e-6, "float16": 4e-4, "bfloat16": 4e-3}
DTYPES = [pytest.param(name, marks=pytest.mark.slow) if name == "bfloat16" else name for name in FLOOR]
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    worker = Path(__file__).with_name("interpreter_worker.py")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, worker], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def answer(**request: Any) -> dict[str, Any]:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
            assert line, "the interpreter's process died: its error is on stderr"
            return json.loads(line)

        yield answer
        stdin.close()


def assert_parity(answer: dict[str, Any], dtype: str) -> None:
    assert answer["is_finite"] and answer["is_contiguous"]
    assert answer["error"] <= 2 * answer["eager_error"] + FLOOR[dtype], answer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "config"),
    [
        ((1, 1, 1, 1, 1, 8), (16, 16, 4, 1)),
        ((2, 3, 31, 77, 2, 40), (64, 32, 4, 3)),  # text keys: 77 = 2 · 32 + 13
        ((1, 2, 97, 97, 1, 80), (64, 64, 4, 2)),
        ((1, 1, 13, 31, 1, 160), (16, 32, 4, 2)),
        ((3, 1, 16, 64, 1, 24), (64, 64, 4, 2)),  # whole blocks only
        ((1, 2, 128, 256, 1, 64), (128, 64, 8, 2)),
        ((1, 2, 5, 3, 1, 256), (16, 16, 4, 1)),
        ((2, 1, 7, 127, 3, 104), (16, 64, 4, 2)),
    ],
)
def test_keyframe_attention(ask: Ask, shape: tuple[int, ...], config: tuple[int, ...], dtype: str) -> None:
    sizes = dict(zip(("groups", "frames", "tokens", "keys", "heads", "head_size"), shape, strict=True))
    answer = ask(op="keyframe", config=config, dtype=dtype, is_q_strided=sizes["groups"] == 2, **sizes)
    assert_parity(answer, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [None, "window", "holes", "groups"])
@pytest.mark.parametrize(
    ("shape", "config"),
    [
        ((1, 1, 1, 1, 1, 8), (4, 16, 16, 4, 1)),
        ((2, 9, 9, 7, 2, 40), (4, 16, 16, 4, 1)),
        ((1, 1, 10, 31, 1, 80), (8, 16, 16, 8, 1)),  # one streamed frame against a ring buffer
        ((1, 17, 18, 3, 1, 160), (2, 32, 32, 4, 1)),
        ((1, 101, 101, 2, 1, 40), (1, 64, 32, 4, 2)),
        ((1, 3, 256, 1, 1, 24), (1, 16, 64, 1, 2)),
        ((1, 17, 18, 3, 1, 160), (4, 16, 16, 4, 1, "tf32x3", 16)),  # large heads: q and k in chunks of columns
        ((2, 3, 4, 2, 2, 88), (1, 16, 16, 1, 1, "tf32x3", 16)),  # the last chunk is half a one
    ],
)
def test_temporal_attention(
    ask: Ask, shape: tuple[int, ...], config: tuple[int, ...], mask: str | None, dtype: str
) -> None:
    sizes = dict(zip(("groups", "frames", "keys", "tokens", "heads", "head_size"), shape, strict=True))
    answer = ask(op="temporal", config=config, mask=mask, dtype=dtype, **sizes)
    assert_parity(answer, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    ("frames", "channels", "groups", "size", "mean", "config"),
    [
        (1, 2, 1, (1, 1), 0.0, None),
        (2, 12, 4, (5, 7), 2.0, None),
        (1, 80, 8, (8, 8), 2.0, None),  # groups of 10 channels, as SD 1.5's first level; two blocks of channels
        (1, 96, 2, (9, 13), 2.0, (16, 64, 32, 4)),  # several tiles a block, the last one short; two turns a group
        (1, 31, 1, (1, 97), 2.0, (16, 16, 16, 2)),
    ],
)
def test_group_norm(  # noqa: PLR0913 - a case
    ask: Ask, frames: int, channels: int, groups: int, size: tuple[int, int], mean: float,
    config: tuple[int, ...] | None, silu: bool, dtype: str,
) -> None:  # fmt: skip
    answer = ask(op="norm", frames=frames, channels=channels, groups=groups, size=size, mean=mean, config=config,
                 silu=silu, dtype=dtype)  # fmt: skip
    assert_parity(answer, dtype)


def test_group_norm_keeps_a_variance_that_is_small_beside_the_mean(ask: Ask) -> None:
    answer = ask(op="norm", frames=1, channels=32, groups=2, size=[9, 13], mean=3000.0, config=[16, 16, 16, 4],
                 silu=False, dtype="float32")  # fmt: skip
    assert answer["error"] < 1e-2, answer  # float32's step at 3000 is 2·10⁻⁴; mean(x²) - mean(x)² would be off by 0.5
