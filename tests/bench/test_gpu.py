"""What `make bench-gpu` runs: every test that needs a GPU, each part within a limit that leaves nothing running."""

from __future__ import annotations

import _thread
import os
import signal
import threading
from pathlib import Path

import pytest

from bench import gpu

TESTS = Path(__file__).resolve().parents[1]
RUNNER = """
import subprocess, sys
subprocess.run([sys.executable, "-c", "import sys, time; pipe = open(sys.argv[1], 'w'); time.sleep(600)", sys.argv[1]])
"""


def parts_with(path: Path) -> set[str]:
    """The parts that run a file of tests."""
    parts = {**gpu.PARTS, "tensorrt": gpu.TENSORRT}
    files = {name: [gpu.ROOT / word for word in module if word.startswith("tests/")]
             for name, (module, _) in parts.items()}  # fmt: skip
    return {name for name, named in files.items() if any(path == one or one in path.parents for one in named)}


def test_every_test_that_needs_a_gpu_is_in_a_part() -> None:
    texts = {path: path.read_text() for path in TESTS.rglob("test_*.py") if path != Path(__file__)}
    for_a_gpu = [path for path, text in texts.items() if "mark.gpu" in text]
    of_tensorrt = [path for path, text in texts.items() if "mark.tensorrt" in text or "backend_name: str" in text]
    assert len(for_a_gpu) >= 8 and len(of_tensorrt) >= 4
    assert not [path for path in for_a_gpu if not parts_with(path)]
    assert not [path for path in for_a_gpu if path not in of_tensorrt and parts_with(path) == {"tensorrt"}]
    assert not [path for path in of_tensorrt if "tensorrt" not in parts_with(path)]


def test_what_is_run_is_there() -> None:
    for module, _ in (*gpu.PARTS.values(), gpu.TENSORRT):
        assert module[0] == "pytest" or (gpu.ROOT / module[0].replace(".", "/")).with_suffix(".py").is_file()
        assert all((gpu.ROOT / word).exists() for word in module if word.startswith("tests/"))


def test_no_plan_is_built_within_the_limit_of_other_tests() -> None:
    module, _ = gpu.PARTS["tests"]
    assert module[module.index("-k") + 1] == "not tensorrt" and gpu.TENSORRT[1] >= 3600


def test_slower_cards_have_longer() -> None:
    """For an RTX 3090 at its goals: `exact` twice, a tenth of it before each, the others, and as long again to get ready."""
    limit_s = gpu.PARTS["presets"][1]
    assert gpu.limit_on("NVIDIA H100 80GB HBM3", limit_s) == gpu.limit_on("NVIDIA H200", limit_s) == limit_s
    assert gpu.limit_on("NVIDIA GeForce RTX 3090", limit_s) > 2 * (2.2 * 115 + 1.2 * 40 + 2 * 2 * 12)


def test_nothing_outlives_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a part's process has started holds the pipe open; it ends when the part does, here by an interruption."""
    (tmp_path / "runner.py").write_text(RUNNER.replace("sys.argv[1]]", f"{str(tmp_path / 'pipe')!r}]"))
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    closed = threading.Event()

    def watch() -> None:
        with open(tmp_path / "pipe") as pipe:  # once the process that writes is there
            _thread.interrupt_main()
            pipe.read()  # until it is gone
        closed.set()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        threading.Thread(target=watch, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            gpu.run_part(("runner",), 120)
    finally:
        signal.signal(signal.SIGINT, before)
    assert closed.wait(60)


def test_a_part_that_fails_or_takes_too_long_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "endless.py").write_text("import time; time.sleep(600)")
    (tmp_path / "failing.py").write_text("raise SystemExit(3)")
    (tmp_path / "fine.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert gpu.run_part(("fine",), 120) and not gpu.run_part(("failing",), 120)
    assert not gpu.run_part(("endless",), 0.01)
