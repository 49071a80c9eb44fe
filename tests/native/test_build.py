"""What setup.py builds: the CUDA part for every target, and an install without a compiler.

Tests of setup.py and csrc/.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from posecrafter_rt.ops import native

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def setup_module() -> ModuleType:
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("posecrafter_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_posecrafter_cuda_forces_the_cuda_part(setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSECRAFTER_CUDA", "0")
    assert setup_module.find_nvcc() is None
    monkeypatch.setenv("POSECRAFTER_CUDA", "1")
    monkeypatch.setenv("PATH", "")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(setup_module.BuildError, match="no nvcc"):
        setup_module.find_nvcc()


def test_without_a_compiler_the_build_succeeds_and_says_so_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    environment = os.environ | {"CC": "no-such-cc", "CXX": "no-such-cxx", "POSECRAFTER_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path / "lib"), "-t", str(tmp_path / "temp")]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    said = [line for line in ran.stderr.splitlines() if line.startswith("posecrafter-rt:")]
    assert len(said) == 1 and "the reference is used" in said[0]
    assert not list(tmp_path.rglob("_native*"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_nvcc_compiles_and_links_every_target(tmp_path: Path, setup_module: ModuleType) -> None:
    nvcc = shutil.which("nvcc")
    assert nvcc is not None
    archs = setup_module.cuda_archs(nvcc)
    assert {"86", "89", "90"} <= set(archs)
    target = tmp_path / "libaffine.so"
    flags = [*setup_module.NVCC_FLAGS, "-Xptxas", "-v", *setup_module.gencode(archs), "-shared"]
    command = [nvcc, *flags, str(ROOT / "csrc/affine_warp_paste.cu"), "-o", str(target)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    usage = [line for line in built.stderr.splitlines() if "spill stores" in line]
    assert len(usage) == 18 * len(archs)  # dtypes × modes × vector widths
    assert all("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in line for line in usage)


@pytest.mark.skipif(native.missing_reason() is not None, reason=str(native.missing_reason()))
def test_the_extension_imports_without_a_driver() -> None:
    from posecrafter_rt import _native

    assert set(native.build_info()) == {"cuda", "openmp", "cuda_archs", "compiler"}
    assert _native.cuda_error() is None or isinstance(_native.cuda_error(), str)
