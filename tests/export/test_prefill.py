"""Graphs traced by other processes: the same bytes, no process where none helps, and none that is left behind."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from posecrafter_rt.blob_cache import BlobCache
from posecrafter_rt.config import cache_dir
from posecrafter_rt.export import prefill as module
from posecrafter_rt.export.graphs import graph_key
from posecrafter_rt.export.onnx import export_graph
from posecrafter_rt.export.prefill import LONGEST_FIRST, count_workers, missing_graphs, prefill, start_workers
from posecrafter_rt.export.prefill_worker import unfilled_networks
from posecrafter_rt.models.empty import describe_modules
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.spec import NETWORK_NAMES, network_specs
from tests.tiny import NETWORKS

GB = 1_000_000_000


@pytest.fixture
def model(make_tiny_model: Callable[..., PoseModel]) -> PoseModel:
    model = make_tiny_model("clip")
    model.fold()
    return model


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Every process that is started."""
    processes: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)  # type: ignore[call-overload]
            processes.append(self)

    monkeypatch.setattr(module.subprocess, "Popen", Noted)
    return processes


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int | None], None]:
    """machine(cores, free bytes): what this process may use."""

    def set_machine(cores: int, free: int | None) -> None:
        monkeypatch.setattr(module, "usable_cores", lambda: cores)
        monkeypatch.setattr(module, "available_bytes", lambda: free)

    return set_machine


def use_worker(monkeypatch: pytest.MonkeyPatch, path: Path, script: str) -> None:
    """Let every worker be a shell script, whose standard input the names are."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(path))


def keys(model: PoseModel, networks: dict) -> dict[str, dict]:
    arch = model.architecture()
    return {name: graph_key(network, network_specs(arch)[name], arch) for name, network in networks.items()}


def test_a_model_without_weights_has_the_same_graphs(model: PoseModel) -> None:
    assert keys(model, unfilled_networks(describe_modules(model))) == keys(model, model.networks())


@pytest.mark.parametrize("names", [("pose_embedding",), pytest.param(NETWORKS, marks=pytest.mark.slow)])
def test_another_process_traces_the_same_bytes(
    tiny_model: PoseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    model = tiny_model
    model.fold()
    arch, networks = model.architecture(), {name: model.networks()[name] for name in names}
    own, filled = BlobCache(cache_dir() / "graphs"), BlobCache(tmp_path)  # the first is shared with other tests
    for name, network in networks.items():
        export_graph(network, network_specs(arch)[name], arch, own)
    monkeypatch.setattr(model, "networks", lambda: networks, raising=False)
    monkeypatch.setattr(module, "count_workers", lambda num_missing: min(num_missing, 1))
    monkeypatch.setattr(module, "take_name", lambda source: None)  # so that the other process takes all
    stages: list[str] = []
    assert missing_graphs(model, arch, filled) == [*names]
    prefill(model, arch, filled, stages.append)
    assert stages == ["tracing the networks"] and missing_graphs(model, arch, filled) == []
    for key in keys(model, networks).values():
        assert own.path(key).read_bytes() == filled.path(key).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(BlobCache, "load", lambda *arguments: pytest.fail("read to know that it is there"))
        prefill(model, arch, filled, lambda stage: pytest.fail("nothing is missing now"))


@pytest.mark.parametrize(
    ("cores", "free", "missing", "workers"),
    [
        (1, None, 10, 0),
        (2, None, 10, 1),
        (64, None, 10, 2),
        (64, None, 2, 1),  # one for each process
        (64, None, 1, 0),
        (64, None, 0, 0),
        (64, 1 * GB, 10, 0),
        (64, 3 * GB, 10, 1),
        (64, 100 * GB, 10, 2),
    ],
)
def test_as_many_as_help_and_fit(
    machine: Callable[[int, int | None], None], cores: int, free: int | None, missing: int, workers: int
) -> None:
    machine(cores, free)
    assert count_workers(missing) == workers


def test_one_core_starts_no_process_and_traces_nothing_ahead(
    model: PoseModel,
    tmp_path: Path,
    machine: Callable[[int, int | None], None],
    started: list[subprocess.Popen[bytes]],
) -> None:
    machine(1, None)
    prefill(model, model.architecture(), BlobCache(tmp_path), lambda stage: pytest.fail("nothing to wait for"))
    assert not started and not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_starts_no_process(
    model: PoseModel,
    tmp_path: Path,
    machine: Callable[[int, int | None], None],
    started: list[subprocess.Popen[bytes]],
) -> None:
    machine(2, None)
    (tmp_path / "file").write_text("in the way")
    prefill(model, model.architecture(), BlobCache(tmp_path / "file"), lambda stage: pytest.fail("traced for nothing"))
    assert not started


def test_a_worker_that_fails_loses_only_what_it_took(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: list[subprocess.Popen[bytes]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    use_worker(monkeypatch, tmp_path / "worker", "head -c 1 >/dev/null; echo no such thing >&2; exit 3")
    with caplog.at_level(logging.WARNING, "posecrafter_rt"), start_workers(1, "{}", NETWORK_NAMES[:3]) as names:
        started[0].wait()
        assert list(names) == list(NETWORK_NAMES[1:3])
    assert "no such thing" in caplog.text


def test_where_no_process_can_be_started_this_one_takes_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module.sys, "executable", str(tmp_path / "absent"))
    with start_workers(2, "{}", LONGEST_FIRST) as names:
        assert list(names) == list(LONGEST_FIRST)
    assert "no process can be started" in caplog.text


def test_an_interruption_ends_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[subprocess.Popen[bytes]]
) -> None:
    use_worker(monkeypatch, tmp_path / "worker", "exec sleep 60")
    with pytest.raises(KeyboardInterrupt), start_workers(2, "{}", LONGEST_FIRST):
        raise KeyboardInterrupt
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2


def test_a_worker_ends_when_the_process_that_started_it_was_killed() -> None:
    child = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        "from posecrafter_rt.export.prefill_worker import end_with; end_with(int(sys.argv[1]))"
    )
    parent = (
        "import os, subprocess, sys, time; "
        f"subprocess.Popen([sys.executable, '-c', {child!r}, str(os.getpid())]); "
        "print('started', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"started\n"
    process.kill()
    process.communicate(timeout=50)  # until the child, which has inherited the output, has ended too
