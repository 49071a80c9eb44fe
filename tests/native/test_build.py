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


def test_on_windows_an_installation_ends_in_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    # What setup.py imports is there before: under that name it would look for Windows' own modules.
    code = (
        "import runpy, shutil, subprocess, sys; sys.platform = 'win32'; runpy.run_path('setup.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "-q", "egg_info", "--egg-base", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    expected = (1, "error: posecrafter-rt does not run on Windows; use WSL 2\n")
    assert (ran.returncode, ran.stderr) == expected and not list(tmp_path.iterdir())


def test_without_a_compiler_the_build_succeeds_and_says_so_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    environment = os.environ | {"CC": "no-such-cc", "CXX": "no-such-cxx", "POSECRAFTER_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path / "lib"), "-t", str(tmp_path / "temp")]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    said = [line for line in ran.stderr.splitlines() if line.startswith("posecrafter-rt:")]
    assert len(said) == 1 and "the reference is used" in said[0]
    assert not list(tmp_path.rglob("_native*"))


@pytest.mark.skipif(os.name != "posix" or shutil.which("g++") is None, reason="no g++ on PATH")
@pytest.mark.parametrize(
    ("arch", "reason"),  # which nvcc knows; it compiles nothing, as with a host compiler that is too new for it
    [("compute_90", "nvcc' failed with exit code 1"), ("compute_20", "nvcc knows none of the architectures 80, 86,")],
    ids=["fails", "knows no target"],
)
def test_where_nvcc_fails_the_extension_is_built_without_cuda_and_one_line_says_so(
    arch: str, reason: str, tmp_path: Path, setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("pybind11")
    import setuptools

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").write_text(f'#!/bin/sh\n[ "$1" = --list-gpu-arch ] && echo {arch}\n')
    (tmp_path / "bin/nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("POSECRAFTER_CUDA", raising=False)
    source = tmp_path / "small.cpp"
    source.write_text('#ifdef POSECRAFTER_CUDA\n#error\n#endif\nextern "C" void* PyInit_small() { return nullptr; }\n')

    def build() -> None:
        extension = setuptools.Extension("small", [str(source)], language="c++")
        command = setup_module.BuildNative(setuptools.Distribution({"ext_modules": [extension]}))
        command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
        command.ensure_finalized()
        command.run()

    build()
    assert list((tmp_path / "lib").glob("small*"))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("posecrafter-rt:")]
    assert len(said) == 1 and "built without CUDA" in said[0] and reason in said[0]
    monkeypatch.setenv("POSECRAFTER_CUDA", "1")
    shutil.rmtree(tmp_path / "lib")  # so that it is built again
    with pytest.raises(Exception, match=reason):
        build()


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
