"""What `make bench-gpu` runs: every test that needs a GPU, each part within a limit that leaves nothing running."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import gpu, refit
from bench.engines import REFERENCE
from bench.engines import parse as parse_engines

TESTS = Path(__file__).resolve().parents[1]
# A process that starts another, which says when it has the pipe open; and then ends by itself, or does not.
RUNNER = """
import subprocess, sys
holds = "import sys, time; pipe = open(sys.argv[1], 'w'); print(flush=True); time.sleep(600)"
holder = subprocess.Popen([sys.executable, "-c", holds, {pipe!r}], stdout=subprocess.PIPE)
holder.stdout.readline()
sys.exit(3 if {ends} else holder.wait())
"""


def parts_with(path: Path) -> set[str]:
    """The parts that run a file of tests."""
    parts = gpu.PARTS | gpu.TENSORRT
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
    # No plan is built within the limit of other tests.
    assert all("-k" in gpu.PARTS[part][0] for path in of_tensorrt for part in parts_with(path) - {"tensorrt"})


def test_what_is_run_is_there() -> None:
    for module, _ in (gpu.PARTS | gpu.TENSORRT).values():
        assert module[0] == "pytest" or (gpu.ROOT / module[0].replace(".", "/")).with_suffix(".py").is_file()
        assert all((gpu.ROOT / word).exists() for word in module if word.startswith("tests/"))


def test_inductors_slow_tests_are_run_last_of_what_may_be_left_out() -> None:
    words, _ = gpu.PARTS[list(gpu.PARTS)[-1]]
    assert words[-5:] == ("-m", "slow", "-k", "inductor", "tests/engines/test_parity.py")


def test_tensorrt_is_timed_beside_the_reference_and_takes_no_result_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are named by what runs: those of the same name are written over."""
    before, after = (parse_engines(list(parts[name][0][1:])) for parts, name in
                     ((gpu.PARTS, "engines"), (gpu.TENSORRT, "engines with tensorrt")))  # fmt: skip
    assert set(after.engines) - set(before.engines) == {"tensorrt fp16"} and REFERENCE in after.engines
    assert set(before.engines) < set(after.engines) and after.rounds == 1 and not after.quick
    monkeypatch.setattr("sys.argv", list(gpu.TENSORRT["second identities of tensorrt"][0]))
    assert refit.parse().backend == ["torch", "tensorrt"] and refit.parse().json is None


def test_slower_cards_have_longer() -> None:
    """For an RTX 3090 at its goals: `exact` twice, a tenth of it before each, the others, and as long again to get ready."""
    limit_s = gpu.PARTS["presets"][1]
    assert gpu.limit_on("NVIDIA H100 80GB HBM3", limit_s) == gpu.limit_on("NVIDIA H200", limit_s) == limit_s
    assert gpu.limit_on("NVIDIA GeForce RTX 3090", limit_s) > 2 * (2.2 * 115 + 1.2 * 40 + 2 * 2 * 12)


@pytest.fixture
def on_rtx_3090(monkeypatch: pytest.MonkeyPatch) -> None:
    """One part, and TensorRT's, on a card of which only the name is there."""
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda: "NVIDIA GeForce RTX 3090")
    monkeypatch.setattr(gpu, "get_backend", lambda name: SimpleNamespace(unsupported_reason=lambda precision: None))
    monkeypatch.setattr(gpu, "PARTS", {"one": (("module",), 100)})


@pytest.fixture(params=[signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def ending(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A signal that this process hears, whatever it was started by; both are as they were afterwards."""
    before = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGTERM, signal.SIGHUP)}
    yield request.param
    for one, handler in before.items():
        signal.signal(one, handler)


def test_hours_for_tensorrt_are_the_same_on_any_card(
    on_rtx_3090: None, ending: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    monkeypatch.setattr(gpu, "run_part", lambda module, limit_s: limits.append(limit_s) or True)
    assert gpu.main() == 0 and limits == [400, 3600, 1800, 3600]


def test_what_ends_it_ends_the_part(on_rtx_3090: None, ending: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part is in a session of its own, where a signal to this process does not come: `run_part` must be left in order."""
    ended: list[int] = []

    def run_part(module: tuple[str, ...], limit_s: float) -> bool:
        try:
            signal.raise_signal(ending)
            return True
        finally:
            ended.append(1)

    monkeypatch.setattr(gpu, "run_part", run_part)
    with pytest.raises(SystemExit) as caught:
        gpu.main()
    assert caught.value.code == 143 and ended == [1]


def test_what_is_ignored_stays_so(on_rtx_3090: None, ending: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup."""
    signal.signal(ending, signal.SIG_IGN)
    monkeypatch.setattr(gpu, "run_part", lambda module, limit_s: True)
    assert gpu.main() == 0 and signal.getsignal(ending) == signal.SIG_IGN


@pytest.mark.parametrize("ends", [False, True], ids=["interrupted", "ends by itself"])
def test_nothing_outlives_a_part(ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a part's process has started holds the pipe open; it ends when the part does, however that ends."""
    pipe = tmp_path / "pipe"
    (tmp_path / "runner.py").write_text(RUNNER.format(pipe=str(pipe), ends=ends))
    os.mkfifo(pipe)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    opened, closed = threading.Event(), threading.Event()
    wait = subprocess.Popen.wait

    def watch() -> None:
        with open(pipe) as reader:  # once the process that writes is there
            opened.set()
            reader.read()  # until it is gone
        closed.set()

    def interrupted(process: Any, timeout: float | None = None) -> int:
        monkeypatch.setattr(subprocess.Popen, "wait", wait)  # for later calls
        assert opened.wait(60)
        raise KeyboardInterrupt

    threading.Thread(target=watch, daemon=True).start()
    if ends:
        assert not gpu.run_part(("runner",), 120)
    else:
        monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gpu.run_part(("runner",), 120)
    assert closed.wait(60)


def test_a_part_that_fails_or_takes_too_long_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "endless.py").write_text("import time; time.sleep(600)")
    (tmp_path / "failing.py").write_text("raise SystemExit(3)")
    (tmp_path / "fine.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert gpu.run_part(("fine",), 120) and not gpu.run_part(("failing",), 120)
    assert not gpu.run_part(("endless",), 0.01)
