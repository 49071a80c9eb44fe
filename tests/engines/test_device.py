"""What an engine is bound to: the driver's version as the driver tells it, and who may run what was compiled where."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from posecrafter_rt.avatar_networks import check_runs_here
from posecrafter_rt.engines import device
from posecrafter_rt.engines.base import CACHE_HINT
from posecrafter_rt.engines.device import cuda_driver, is_driver_older
from posecrafter_rt.engines.folder import open_folder
from posecrafter_rt.engines.torch import TorchBackend
from posecrafter_rt.errors import EngineFolderError


def test_the_drivers_number_is_read_as_a_version(tmp_path: Path) -> None:
    """1000 · major + 10 · minor, as NVIDIA writes it; told by a library of the driver's name with that one function."""
    (tmp_path / "driver.c").write_text("int cuDriverGetVersion(int *version) { *version = 13020; return 0; }")
    subprocess.run(
        ["cc", "-shared", "-fPIC", str(tmp_path / "driver.c"), "-o", str(tmp_path / "libcuda.so.1")], check=True
    )
    code = f"import runpy; print(runpy.run_path({device.__file__!r})['cuda_driver']())"  # not all that engines import
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "13.2\n", done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_a_real_driver_runs_the_cuda_that_torch_was_built_for() -> None:
    assert torch.version.cuda is not None
    assert int(cuda_driver().split(".")[0]) >= int(torch.version.cuda.split(".")[0])


@pytest.mark.parametrize(
    ("built", "here", "is_older"),
    [("13.0", "13.0", False), ("13.0", "13.1", False), ("12.8", "13.0", False), ("13.1", "13.0", True),
     ("13.10", "13.9", True), ("13.0", "12.9", True), (None, "13.0", False), (None, None, False)],
)  # fmt: skip
def test_only_an_older_driver_is_too_old(built: str | None, here: str | None, is_older: bool) -> None:
    devices = [{} if version is None else {"cuda_driver": version} for version in (built, here)]
    assert is_driver_older(*devices) is is_older


def test_an_engine_of_a_newer_driver_is_refused_with_what_mends_it(
    tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_folder(tiny_engine)
    bound = {"type": "cuda", "name": "A (9.0)", "cuda_driver": "13.1"}
    folder = replace(folder, manifest={**folder.manifest, "device": bound})
    here = {**bound}
    monkeypatch.setattr(TorchBackend, "device", lambda self: here)
    check_runs_here(folder)
    here["cuda_driver"] = "13.2"
    check_runs_here(folder)
    here["cuda_driver"] = "13.0"
    with pytest.raises(EngineFolderError, match=r"a driver for CUDA 13\.1, this one is for 13\.0$") as caught:
        check_runs_here(folder)
    rebuild = f"build-engine tuned.ckpt -o {tiny_engine} --backend torch --precision fp32 --size 32x32 --force"
    assert caught.value.hint and caught.value.hint.endswith(rebuild)


def test_an_engine_whose_backend_cannot_run_here_is_built_again_for_one_that_can(
    tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_folder(tiny_engine)
    folder = replace(folder, manifest={**folder.manifest, "max_frames": 64})
    monkeypatch.setattr(TorchBackend, "unsupported_reason", lambda self, precision: f"no {precision} here")
    with pytest.raises(EngineFolderError, match="needs backend torch: no fp32 here") as caught:
        check_runs_here(folder)
    assert caught.value.hint and caught.value.hint.endswith(f"tuned.ckpt -o {tiny_engine} --size 32x32 --force")


def test_an_engine_that_lacks_a_cache_only_is_not_built_again(
    tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "int8 needs operations that cannot be had here: they cannot be kept: permission denied"
    monkeypatch.setattr(TorchBackend, "unsupported_reason", lambda self, precision: f"{reason}; {CACHE_HINT}")
    with pytest.raises(EngineFolderError, match=f"needs backend torch: {reason}$") as caught:
        check_runs_here(open_folder(tiny_engine))
    assert caught.value.hint == CACHE_HINT


def test_an_engine_that_does_not_run_here_has_the_name_that_the_user_gave(
    tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "current"
    link.symlink_to(tiny_engine)
    monkeypatch.setattr(TorchBackend, "unsupported_reason", lambda self, precision: f"no {precision} here")
    with pytest.raises(EngineFolderError, match=f"^{link} needs backend torch") as caught:
        check_runs_here(open_folder(link))
    assert caught.value.hint and f" -o {link} " in caught.value.hint


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_processor_multiplies_bf16_or_does_not_and_never_fp16(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool
) -> None:
    monkeypatch.setattr(device, "cpu_gains_by_bf16", lambda: has_bf16)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [device.multiplies(precision, cpu) for precision in ("fp32", "bf16", "fp16")] == [True, has_bf16, False]
    assert all(device.multiplies(precision, gpu) for precision in ("fp32", "bf16", "fp16"))
