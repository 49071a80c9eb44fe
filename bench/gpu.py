"""Runs everything that needs a GPU: tests, timings of operators, renders and a stream of Stable Diffusion 1.5's size.

Bench: `make bench-gpu`. It takes about a quarter of an hour on an H100, plus the time that `inductor` compiles, plus up
to two and a half hours where TensorRT can run. The most important parts come first. loop, engines and refit publish
only at their end, so they leave nothing if their time limit cuts them off. Writes results/kernels-<device>, presets-…,
throughput-…, latency-…, loop-…, engines-… and refit-…, .json and .md each. Exits with 1 if a part fails, after the
others have run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import torch

from posecrafter_rt.engines import get_backend

ROOT = Path(__file__).resolve().parents[1]
# Tests that are marked gpu, and tests that use a GPU if there is one.
TESTS = ("tests/ops/test_affine_warp_paste.py", "tests/kernels/test_gpu.py", "tests/runtime", "tests/engines/test_torch.py",
         "tests/engines/test_cuda_graphs.py", "tests/engines/test_device.py", "tests/test_avatar.py",
         "tests/test_avatar_segments.py", "tests/test_building.py")  # fmt: skip
# Tests that run for each backend separately. `TESTS` has STREAMS as well, for all backends but TensorRT.
OF_BACKENDS = ("tests/engines/test_parity.py", "tests/test_refit.py")
STREAMS = "tests/runtime/test_stream.py"
SD15 = ("--base", "random-sd15", "--work", "{work}")  # written once; parts with the same options share an engine
SD15_TORCH = (*SD15, "--backend", "torch", "--precision", "bf16")
ENGINES = ("bench.engines", "--rounds", "1", "--engines", "torch fp32", "torch fp16", "torch bf16")
REFIT = ("bench.refit", "--backend", "torch")
PARTS = {  # each with its limit in seconds on an H100
    "tests": (("pytest", "-q", "-n", "4", "-k", "not tensorrt", *TESTS), 150),
    "refits": (("pytest", "-q", "-n", "2", "-k", "torch", *OF_BACKENDS), 40),
    "inductor": (("pytest", "-q", "tests/engines/test_inductor.py"), 60),
    # about fifty contenders at 0.3 s, a few peaks, and each kernel's first compilation
    "operators": (("bench.kernels", "--budget-s", "0.3"), 110),
    "presets": (("bench.presets", *SD15_TORCH), 240),
    "renders": (("bench.throughput", *SD15, "--frames", "16", "--steps", "20", "--rounds", "1",
                "--engines", "torch:fp16", "torch:fp32"), 240),
    "streams": (("bench.latency", *SD15_TORCH, "--steps", "2", "--rate", "60", "--seconds", "5"), 200),
    # The parts from here on may be left out if time is short.
    "loop": (("bench.loop", *SD15_TORCH), 110),
    "engines": (ENGINES, 110),
    "second identities": (REFIT, 110),
    # A dozen networks, each compiled once; that takes minutes on two CPU cores.
    "inductor's networks": (("pytest", "-q", "-m", "slow", "-k", "inductor", "tests/engines/test_parity.py"), 600),
}  # fmt: skip
# TensorRT has about a hundred plans to build, and each takes minutes, so its parts are separate. The tests stop after
# three failures; these tell what to mend. The timings include `torch` again, because the results replace those of the
# same names above.
TENSORRT = {
    "tensorrt": (("pytest", "--maxfail=3", "-q", "-k", "tensorrt", "tests/engines/test_tensorrt.py", *OF_BACKENDS, STREAMS), 3600),
    "engines with tensorrt": ((*ENGINES, "tensorrt fp16"), 1800),
    "second identities of tensorrt": ((*REFIT, "tensorrt"), 3600),
}  # fmt: skip
# A render on an RTX 3090 should take ten times as long as on an H100. Starting, building and writing, which are half of
# a part, take no longer.
OTHER_CARDS = 4


def limit_on(gpu: str, limit_s: float) -> float:
    """Return a part's limit in seconds on a card, given the name that its driver reports."""
    return limit_s if any(name in gpu for name in ("H100", "H200")) else OTHER_CARDS * limit_s


def run_part(module: tuple[str, ...], limit_s: float) -> bool:
    """Run `python -m …`; return whether it succeeded in time. Processes that it leaves behind are killed."""
    process = subprocess.Popen([sys.executable, "-m", *module], cwd=ROOT, start_new_session=True)
    try:
        return process.wait(limit_s) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        with suppress(ProcessLookupError):  # nothing is left to kill
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> int:
    if not torch.cuda.is_available():
        print("error: torch sees no GPU", file=sys.stderr)
        return 1
    for ending in (signal.SIGTERM, signal.SIGHUP):  # a part has a session of its own, which they do not reach
        if signal.getsignal(ending) != signal.SIG_IGN:  # as under nohup
            signal.signal(ending, lambda *_: sys.exit(143))
    failed, gpu = [], torch.cuda.get_device_name()
    parts = {name: (module, limit_on(gpu, limit_s)) for name, (module, limit_s) in PARTS.items()}
    if get_backend("tensorrt").unsupported_reason("fp16") is None:
        parts |= TENSORRT  # its limits are for any card
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as work:
        for name, (module, limit_s) in parts.items():
            if not run_part(tuple(word.format(work=work) for word in module), limit_s):
                print(f"error: {name}: failed, or took more than {limit_s:g} s", file=sys.stderr)
                failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
