"""The cache folder follows the environment, and what a process is given of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from posecrafter_rt.config import cache_dir, onnxruntime_threads, temporary_files_in
from posecrafter_rt.errors import PoseCrafterError


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POSECRAFTER_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.setenv("POSECRAFTER_CACHE", "")  # set and empty counts as not set
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "posecrafter-rt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "posecrafter-rt"


@pytest.mark.parametrize(("own", "message"), [
    ("~nobody of this name/x", "POSECRAFTER_CACHE is ~nobody of this name/x, whose home is not known"),
    ("", "this user has no home for the cache")])  # fmt: skip
def test_a_user_without_a_home_is_told_to_name_a_folder(
    monkeypatch: pytest.MonkeyPatch, own: str, message: str
) -> None:
    monkeypatch.setenv("POSECRAFTER_CACHE", own)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 5)  # as in a container that is run as any number
    with pytest.raises(PoseCrafterError) as caught:
        cache_dir()
    assert (str(caught.value), caught.value.hint) == (message, "set POSECRAFTER_CACHE to a folder that can be written")


def test_a_process_makes_its_temporary_files_where_it_is_told(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import tempfile; print(tempfile.mkdtemp())"]
    made = subprocess.run(command, env=temporary_files_in(tmp_path), capture_output=True, text=True, check=True).stdout
    assert Path(made.strip()).parent == tmp_path


# Prints how many threads a session of ONNX Runtime's has started.
SESSION = """
import os, onnx, onnxruntime
a, b = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 2]) for name in "ab")
graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["a", "a"], ["b"])], "product", [a], [b])
model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
before = len(os.listdir("/proc/self/task"))
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_onnx_runtime_computes_in_as_many_threads_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that calls it is one of them."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime", minversion="1.29", reason="only since 1.29")
    monkeypatch.delenv("ORT_INTRA_OP_NUM_THREADS", raising=False)
    assert "ORT_INTRA_OP_NUM_THREADS" not in onnxruntime_threads(None)
    for own, count in ((None, 5), ("3", 3)):  # what the user has set, and what comes of it
        if own:
            monkeypatch.setenv("ORT_INTRA_OP_NUM_THREADS", own)
        call = [sys.executable, "-c", SESSION]
        said = subprocess.run(call, env=onnxruntime_threads(5), capture_output=True, text=True, check=True).stdout
        assert int(said) == count - 1
