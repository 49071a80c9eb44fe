"""Everything that needs a GPU, in one go: tests, every operator's timing, whole renders' and a stream's at Stable Diffusion 1.5's size.

Bench: `make bench-gpu`; about a quarter of an hour on an H100, what `inductor` compiles besides, and up to two and a half hours more
where TensorRT can run. What matters most comes first; loop, engines and refit publish at their end, so that one that its limit cuts
off leaves nothing. Writes results/kernels-<device>, presets-…, throughput-…, latency-…, loop-…, engines-… and refit-…, .json and
.md each; exits 1 if a part fails, after the others have run.
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
# What is marked gpu, and what runs on a GPU where there is one.
TESTS = ("tests/ops/test_affine_warp_paste.py", "tests/kernels/test_gpu.py", "tests/runtime", "tests/engines/test_torch.py",
         "tests/engines/test_cuda_graphs.py", "tests/engines/test_device.py", "tests/test_avatar.py",
         "tests/test_avatar_segments.py", "tests/test_building.py")  # fmt: skip
# For every backend in turn; the streams' proof as well, which `TESTS` has for all but TensorRT.
OF_BACKENDS = ("tests/engines/test_parity.py", "tests/test_refit.py")
STREAMS = "tests/runtime/test_stream.py"
SD15 = ("--base", "random-sd15", "--work", "{work}")  # written once, and one engine for all that take the same
SD15_TORCH = (*SD15, "--backend", "torch", "--precision", "bf16")
ENGINES = ("bench.engines", "--rounds", "1", "--engines", "torch fp32", "torch fp16", "torch bf16")
REFIT = ("bench.refit", "--backend", "torch")
PARTS = {  # each with its limit in seconds on an H100
    "tests": (("pytest", "-q", "-n", "4", "-k", "not tensorrt", *TESTS), 150),
    "refits": (("pytest", "-q", "-n", "2", "-k", "torch", *OF_BACKENDS), 40),
    "inductor": (("pytest", "-q", "tests/engines/test_inductor.py"), 60),
    # some fifty contenders and a few peaks at a quarter of 1.2 s, and each kernel's first compilation
    "operators": (("bench.kernels", "--budget-s", "1.2"), 110),
    "presets": (("bench.presets", *SD15_TORCH), 240),
    "renders": (("bench.throughput", *SD15, "--frames", "16", "--steps", "20", "--rounds", "1", "--engines", "torch:fp16"), 190),
    "streams": (("bench.latency", *SD15_TORCH, "--steps", "2", "--rate", "60", "--seconds", "5"), 200),
    # What may be left out where time is short.
    "loop": (("bench.loop", *SD15_TORCH), 110),
    "engines": (ENGINES, 110),
    "second identities": (REFIT, 110),
    # A dozen networks that are compiled once; on two cores of a processor that takes minutes.
    "inductor's networks": (("pytest", "-q", "-m", "slow", "-k", "inductor", "tests/engines/test_parity.py"), 600),
}  # fmt: skip
# Its plans take minutes to build, a hundred of them: no part of the others, and the first failures, of a precision perhaps, tell
# what to mend. What is timed is timed beside `torch` once more, so that the results, of the same names as those above, lack nothing that those had.
TENSORRT = {
    "tensorrt": (("pytest", "--maxfail=3", "-q", "-k", "tensorrt", "tests/engines/test_tensorrt.py", *OF_BACKENDS, STREAMS), 3600),
    "engines with tensorrt": ((*ENGINES, "tensorrt fp16"), 1800),
    "second identities of tensorrt": ((*REFIT, "tensorrt"), 3600),
}  # fmt: skip
# A render on an RTX 3090 is to take ten times an H100's time; starting, building and writing, half of a part, do not grow.
OTHER_CARDS = 4


def limit_on(gpu: str, limit_s: float) -> float:
    """A part's limit in seconds on a card, by the name that its driver gives."""
    return limit_s if any(name in gpu for name in ("H100", "H200")) else OTHER_CARDS * limit_s


def run_part(module: tuple[str, ...], limit_s: float) -> bool:
    """Run `python -m …`: whether it succeeded in time. Nothing that it started outlives it, to slow the next part."""
    process = subprocess.Popen([sys.executable, "-m", *module], cwd=ROOT, start_new_session=True)
    try:
        return process.wait(limit_s) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        with suppress(ProcessLookupError):  # where nothing is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> int:
    if not torch.cuda.is_available():
        print("error: torch sees no GPU", file=sys.stderr)
        return 1
    for ending in (signal.SIGTERM, signal.SIGHUP):  # a part is in a session of its own, where they do not come
        if signal.getsignal(ending) != signal.SIG_IGN:  # as under nohup
            signal.signal(ending, lambda *_: sys.exit(143))
    failed, gpu = [], torch.cuda.get_device_name()
    parts = {name: (module, limit_on(gpu, limit_s)) for name, (module, limit_s) in PARTS.items()}
    if get_backend("tensorrt").unsupported_reason("fp16") is None:
        parts |= TENSORRT  # its hours are for any card
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as work:
        for name, (module, limit_s) in parts.items():
            if not run_part(tuple(word.format(work=work) for word in module), limit_s):
                print(f"error: {name}: failed, or took more than {limit_s:g} s", file=sys.stderr)
                failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
