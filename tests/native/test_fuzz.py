"""A host build of the kernels' header, fuzzed under the address and undefined-behaviour sanitizers.

Tests of csrc/affine_warp_paste.h and .cpp through fuzz_affine.cpp.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow"
SECONDS = "1.5"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
@pytest.mark.parametrize("macro", ["-UPOSECRAFTER_PORTABLE", "-DPOSECRAFTER_PORTABLE"])
def test_fuzz(tmp_path: Path, macro: str) -> None:
    program = tmp_path / "fuzz_affine"
    sources = [ROOT / "tests/native/fuzz_affine.cpp", ROOT / "csrc/affine_warp_paste.cpp"]
    flags = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-fopenmp", SANITIZERS, "-fno-sanitize-recover=all", macro]
    command = ["g++", *flags, f"-I{ROOT / 'csrc'}", *sources, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find -lasan" in built.stderr or "cannot find -lubsan" in built.stderr:
        pytest.skip("g++ has no sanitizer libraries")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program, SECONDS, "2405"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.endswith(" rounds\n")
