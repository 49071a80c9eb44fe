"""C++ fuzzed under the address and undefined-behaviour sanitizers: a host build of the kernels' header, and `openvino`'s operations.

Tests of csrc/affine_warp_paste.h and .cpp through fuzz_affine.cpp, of engines/operations/ through fuzz_operations.cpp.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from posecrafter_rt.engines.openvino_operations import SOURCES, VECTORS
from posecrafter_rt.machine import cpu_features
from tests.native.amx_flags import in_software

ROOT = Path(__file__).resolve().parents[2]
# Without checks of what the address sanitizer sees, too: they take a fifth of the time of compiling.
SANITIZERS = (
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize=null,object-size,vptr,nonnull-attribute,returns-nonnull-attribute",
)
SECONDS = "1.5"
OPERATIONS = [
    ROOT / "tests/native/fuzz_operations.cpp",
    *(source for source in sorted(SOURCES.glob("*.cpp")) if source.name != "extension.cpp"),  # that is OpenVINO's
]


def fuzz(program: Path, flags: list[str], include: Path, sources: list[Path]) -> None:
    """Build a program that takes seconds and a seed, and run it."""
    options = ["-std=c++17", "-O1", "-g1", *SANITIZERS, "-fno-sanitize-recover=all", *flags, f"-I{include}"]
    built = subprocess.run(["g++", *options, *sources, "-o", program], capture_output=True, text=True)
    if "cannot find -lasan" in built.stderr or "cannot find -lubsan" in built.stderr:
        pytest.skip("g++ has no sanitizer libraries")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program, SECONDS, "2405"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.endswith(" rounds\n")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
@pytest.mark.parametrize("macro", ["-UPOSECRAFTER_PORTABLE", "-DPOSECRAFTER_PORTABLE"])
def test_affine(tmp_path: Path, macro: str) -> None:
    sources = [ROOT / "tests/native/fuzz_affine.cpp", ROOT / "csrc/affine_warp_paste.cpp"]
    fuzz(tmp_path / "fuzz_affine", ["-ffp-contract=off", "-fopenmp", macro], ROOT / "csrc", sources)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
@pytest.mark.parametrize("lanes", [16, 8])
def test_operations(tmp_path: Path, lanes: int) -> None:
    """In vectors of so many floats, in 16 and eight bits as well where this processor has them."""
    found = [vectors for vectors in VECTORS if vectors.lanes == lanes and vectors.needed <= cpu_features()]
    if not found:
        pytest.skip(f"this processor has no vectors of {lanes} floats")
    fuzz(tmp_path / "fuzz_operations", ["-pthread", *found[0].flags], SOURCES, OPERATIONS)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
def test_operations_in_tiles(tmp_path: Path) -> None:
    """By a processor without AMX, in software."""
    vectors = VECTORS[0]
    if not {need for need in vectors.needed if not need.startswith("amx")} <= cpu_features():
        pytest.skip("this processor lacks more than AMX")
    if vectors.needed <= cpu_features():
        pytest.skip("this processor has AMX: test_operations is of it")
    fuzz(tmp_path / "fuzz_operations", ["-pthread", *in_software(vectors.flags)], SOURCES, OPERATIONS)
