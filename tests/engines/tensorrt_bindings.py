"""TensorRT's published bindings without its library: run code in a process where `import tensorrt` works.

Not a test. The bindings link against three libraries that only NVIDIA's own index has; empty ones with the nine
symbols that are asked for let the module load, so that its names can be read and its Python code be run. Nothing can be
built or run with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

LIBRARIES = {
    "nvinfer": ("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
                "getBuilderPluginRegistry", "getPluginRegistry"),
    "nvinfer_plugin": ("initLibNvInferPlugins",),
    "nvonnxparser": ("createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getNvOnnxParserVersion"),
}  # fmt: skip
MAJOR = 11
PROLOGUE = "import sys, tensorrt_bindings\nsys.modules['tensorrt'] = tensorrt_bindings\n"


def missing_reason() -> str | None:
    """Why it cannot be done here."""
    if find_spec("tensorrt_bindings") is None:
        return "tensorrt-cu13-bindings is not installed"
    if not sys.platform.startswith("linux"):
        return "needs Linux"
    return None


def write_libraries(folder: Path) -> Path:
    """Compile the libraries. Raises: CalledProcessError, FileNotFoundError without a C compiler."""
    for name, symbols in LIBRARIES.items():
        source = folder / f"{name}.c"
        source.write_text("\n".join(f"void *{symbol}(void) {{ return 0; }}" for symbol in symbols))
        file = f"lib{name}.so.{MAJOR}"
        command = ["cc", "-shared", "-fPIC", str(source), "-o", str(folder / file), f"-Wl,-soname,{file}"]
        subprocess.run(command, check=True)
    return folder


def run(code: str, libraries: Path) -> str:
    """Standard output of `code`. Raises: AssertionError with its standard error when it fails."""
    path = os.pathsep.join(filter(None, (str(libraries), os.environ.get("LD_LIBRARY_PATH"))))
    environment = {**os.environ, "LD_LIBRARY_PATH": path}
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + code], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
