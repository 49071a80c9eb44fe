"""Everything that needs a GPU, in one go: the gpu tests, then every operator's timing, into one JSON and one table.

Bench: `make bench-gpu`; under eight minutes. Writes results/kernels-<device>.json and .md; exits 1 if a test fails.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
TEST_LIMIT_S = 180
BENCH_LIMIT_S = 270


def main() -> int:
    if not torch.cuda.is_available():
        print("error: torch sees no GPU", file=sys.stderr)
        return 1
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not slow", "tests/ops", "tests/kernels"]
    failed = subprocess.run(tests, cwd=ROOT, timeout=TEST_LIMIT_S).returncode
    # 36 contenders and a few peaks at 0.7 s, and each kernel's first compilation
    bench = [sys.executable, "-m", "bench.kernels", "--budget-s", "0.7"]
    return subprocess.run(bench, cwd=ROOT, timeout=BENCH_LIMIT_S).returncode or failed


if __name__ == "__main__":
    sys.exit(main())
