"""Everything that needs a GPU, in one go: tests, every operator's timing, whole renders' and a stream's at Stable Diffusion 1.5's size.

Bench: `make bench-gpu`; a quarter of an hour at most, and up to an hour more where TensorRT can run. Writes results/kernels-<device>,
presets-…, throughput-… and latency-…, .json and .md each; exits 1 if a part fails, after the others have run.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from posecrafter_rt.engines import get_backend

ROOT = Path(__file__).resolve().parents[1]
# What is marked gpu, and what runs on a GPU where there is one.
TESTS = ("tests/ops/test_affine_warp_paste.py", "tests/kernels/test_gpu.py", "tests/runtime", "tests/engines/test_torch.py",
         "tests/engines/test_cuda_graphs.py", "tests/test_avatar.py", "tests/test_avatar_segments.py", "tests/test_building.py")  # fmt: skip
# For every backend in turn.
OF_BACKENDS = ("tests/engines/test_parity.py", "tests/test_refit.py")
PARTS = {  # each with its limit in seconds
    "tests": (("pytest", "-q", "-n", "4", *TESTS), 150),
    "refits": (("pytest", "-q", "-n", "2", "-k", "torch", *OF_BACKENDS), 40),
    "inductor": (("pytest", "-q", "tests/engines/test_inductor.py"), 60),
    # some fifty contenders and a few peaks at a quarter of 1.2 s, and each kernel's first compilation
    "operators": (("bench.kernels", "--budget-s", "1.2"), 110),
    "presets": (("bench.presets", "--base", "random-sd15", "--backend", "torch", "--precision", "bf16"), 150),
    "renders": (("bench.throughput", "--base", "random-sd15", "--frames", "16", "--steps", "20", "--rounds", "1",
                 "--engines", "torch:fp16"), 190),
    "streams": (("bench.latency", "--base", "random-sd15", "--size", "512x512", "--backend", "torch", "--precision", "bf16",
                 "--steps", "2", "--rate", "60", "--seconds", "5"), 200),
}  # fmt: skip
# Its plans take minutes to build, a hundred of them: no part of the others, and what fails first tells what to mend.
TENSORRT = (("pytest", "-x", "-q", "-k", "tensorrt", "tests/engines/test_tensorrt.py", *OF_BACKENDS), 3600)


def main() -> int:
    if not torch.cuda.is_available():
        print("error: torch sees no GPU", file=sys.stderr)
        return 1
    failed = []
    can_run_tensorrt = get_backend("tensorrt").unsupported_reason("fp16") is None
    parts = {**PARTS, "tensorrt": TENSORRT} if can_run_tensorrt else PARTS
    for name, (module, limit_s) in parts.items():
        try:
            done = subprocess.run([sys.executable, "-m", *module], cwd=ROOT, timeout=limit_s).returncode == 0
        except subprocess.TimeoutExpired:
            done = False
        if not done:
            print(f"error: {name}: failed, or took more than {limit_s} s", file=sys.stderr)
            failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
