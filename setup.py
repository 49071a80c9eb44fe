"""Build `posecrafter_rt._native` if there is a compiler, and map kernels/ and export/ into the package.

Packaging: every other setting is in pyproject.toml.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

if sys.platform == "win32":  # the package would install, and then miss file locks and memory limits in every command
    sys.exit("error: posecrafter-rt does not run on Windows; use WSL 2")

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PACKAGES = [
    "posecrafter_rt",
    "posecrafter_rt.cli",
    "posecrafter_rt.demo",
    "posecrafter_rt.embedded",
    "posecrafter_rt.engines",
    "posecrafter_rt.evaluate",
    "posecrafter_rt.export",
    "posecrafter_rt.kernels",
    "posecrafter_rt.method",
    "posecrafter_rt.models",
    "posecrafter_rt.ops",
    "posecrafter_rt.poses",
    "posecrafter_rt.runtime",
    "posecrafter_rt.serve",
]
PACKAGE_DIR = {"posecrafter_rt.kernels": "kernels", "posecrafter_rt.export": "export"}
CUDA_ARCHS = ("80", "86", "89", "90")  # plus PTX of the last, for newer architectures
# No contraction into fused multiply-adds: so the CPU path, the CUDA path and the reference agree bit for bit.
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
CXX_FLAGS += ["-fvisibility=hidden"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-cudart", "static", "-Xcompiler", "-fPIC"]


class BuildError(Exception):
    """A compiler or toolkit is missing, or it rejects the sources."""


def find_nvcc() -> str | None:
    """Return the path of nvcc or None. POSECRAFTER_CUDA=0: do not search; =1: raise BuildError if it is missing."""
    wish = os.environ.get("POSECRAFTER_CUDA", "")
    if wish == "0":
        return None
    roots = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = next((found for root in roots if (found := shutil.which("nvcc", path=f"{root}/bin"))), shutil.which("nvcc"))
    if nvcc is None and wish == "1":
        raise BuildError("POSECRAFTER_CUDA=1, but no nvcc on PATH or in CUDA_HOME")
    return nvcc


def cuda_archs(nvcc: str) -> list[str]:
    """Return those of CUDA_ARCHS that this nvcc knows. Raises: BuildError if there are none."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    archs = [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known.split()]
    if not archs:
        raise BuildError(f"{nvcc} knows none of the architectures {', '.join(CUDA_ARCHS)}")
    return archs


def gencode(archs: list[str]) -> list[str]:
    """Return nvcc's flags for machine code of every architecture and PTX of the newest."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def cuda_library_dir(nvcc: str) -> str:
    """Return the folder of libcudart_static.a, found from the real nvcc (the one on PATH may only be a wrapper)."""
    dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"_HERE_=(.*)", dryrun)
    root = Path(top.group(1)).parent if top else Path(nvcc).resolve().parent.parent
    folders = [root / "lib64", root / "lib", root / "targets" / "x86_64-linux" / "lib"]
    found = next((folder for folder in folders if (folder / "libcudart_static.a").exists()), None)
    if found is None:
        raise BuildError(f"libcudart_static.a is not below {root}")
    return str(found)


class BuildNative(build_ext):
    """Compile the extension, with CUDA if there is an nvcc that works. Without a compiler the package still installs."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # each compiler class raises its own exceptions; none may stop a pure-Python install
            if os.environ.get("POSECRAFTER_CUDA") == "1":
                raise
            print(f"posecrafter-rt: built without native operators ({error}); the reference is used", file=sys.stderr)
            self.extensions = []

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        ext.include_dirs.append(pybind11.get_include())
        ext.extra_compile_args = [*CXX_FLAGS, *self.openmp()]
        ext.extra_link_args = self.openmp()
        nvcc = find_nvcc()
        if nvcc is not None:
            try:
                self.add_cuda(ext, nvcc)
            except Exception as error:  # such as a host compiler that is too new for this nvcc
                if os.environ.get("POSECRAFTER_CUDA") == "1":
                    raise
                print(f"posecrafter-rt: built without CUDA ({error})", file=sys.stderr)
        super().build_extension(ext)

    def openmp(self) -> list[str]:
        """Return the OpenMP flag if the compiler accepts it (Apple's does not)."""
        probe = Path(self.build_temp) / "openmp.cpp"
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [*self.compiler.compiler_so, "-fopenmp", "-c", str(probe), "-o", str(probe.with_suffix(".o"))]
        taken = subprocess.run(command, capture_output=True).returncode == 0
        return ["-fopenmp"] if taken else []

    def add_cuda(self, ext: Extension, nvcc: str) -> None:
        """Compile the .cu file with nvcc, and link its object and the static CUDA runtime into the extension.

        If that fails, the extension is unchanged.
        """
        archs = cuda_archs(nvcc)
        target = Path(self.build_temp) / "affine_warp_paste_cuda.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        self.spawn([nvcc, *NVCC_FLAGS, *gencode(archs), "-c", "csrc/affine_warp_paste.cu", "-o", str(target)])
        library_dir = cuda_library_dir(nvcc)
        names = " ".join([*(f"sm_{arch}" for arch in archs), f"compute_{archs[-1]}"])
        ext.define_macros += [("POSECRAFTER_CUDA", None), ("POSECRAFTER_CUDA_ARCHS", f'"{names}"')]
        ext.extra_objects.append(str(target))
        ext.library_dirs.append(library_dir)
        ext.libraries += ["cudart_static", "dl", "rt", "pthread"]


if __name__ == "__main__":
    native = Extension(
        "posecrafter_rt._native",
        ["csrc/affine_warp_paste.cpp", "csrc/array.cpp", "csrc/bindings.cpp"],
        depends=["csrc/affine_warp_paste.h", "csrc/affine_warp_paste.cu", "csrc/array.h", "csrc/dlpack.h"],
        language="c++",
    )
    setup(
        packages=PACKAGES,
        package_dir=PACKAGE_DIR,
        ext_modules=[native],
        cmdclass={"build_ext": BuildNative},
    )
