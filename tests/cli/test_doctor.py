"""Tests of `doctor` and its checks.

Tests; what the machine has is replaced where the answer would depend on it.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from posecrafter_rt.cli import checks
from posecrafter_rt.cli.checks import Finding
from posecrafter_rt.cli.main import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_json_and_exit_code_agree() -> None:
    result = run("--json")
    report = json.loads(result.stdout)
    assert list(report["sections"]) == list(checks.SECTIONS)
    assert result.exit_code == (0 if report["usable"] else 1)


def test_every_operator_backend_is_listed_with_a_reason_or_can_run() -> None:
    findings = checks.check_operators()
    names = {finding.name for finding in findings}
    assert {"affine_warp_paste: reference", "keyframe_attention: triton", "native extension"} <= names
    assert all(finding.detail for finding in findings)
    assert all(finding.status == "ok" for finding in findings if finding.name.endswith("reference"))


def test_every_backend_is_listed_with_the_precisions_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posecrafter_rt.engines.openvino_operations.cpu_features", lambda: {"avx2", "fma"})
    findings = {finding.name: finding for finding in checks.check_engines()}
    assert findings["torch"].status == "ok"
    assert findings["torch"].detail == "can run in fp32, bf16, fp16; int8: it has no int8; use fp32, bf16 or fp16"
    assert "int8: this processor has no VNNI; use fp32" in findings["openvino"].detail
    assert "int8" not in findings["auto"].detail


def test_the_processor_is_shown_with_what_decides_on_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posecrafter_rt.machine.cpu_features", lambda: {"fma", "avx2", "avx_vnni", "avx512_vnni"})
    processor = next(finding for finding in checks.check_machine() if finding.name == "processor")
    assert "avx2 avx_vnni avx512_vnni, tuning is fast in fp32" in processor.detail


@pytest.mark.parametrize(("room", "told"), [(int(1.9 * 2**30), ", 1.9 GiB may still be taken"), (None, "")])
def test_memory_is_shown_with_what_a_container_leaves_of_it(
    monkeypatch: pytest.MonkeyPatch, room: int | None, told: str
) -> None:
    monkeypatch.setattr("posecrafter_rt.machine.available_bytes", lambda: room)
    memory = next(finding for finding in checks.check_machine() if finding.name == "memory")
    assert re.fullmatch(r"\d+\.\d GiB" + told, memory.detail)


@pytest.mark.parametrize(("driver", "told"), [
    ("13.0", "an NVIDIA driver is here, but "),  # also on WSL 2, which has nothing of it in /proc
    (None, "no NVIDIA driver; the CPU is used"),
])  # fmt: skip
def test_a_driver_is_there_where_its_library_is(monkeypatch: pytest.MonkeyPatch, driver: str | None, told: str) -> None:
    def cuda_driver() -> str:
        if driver is None:
            raise OSError("libcuda.so.1: cannot open shared object file: No such file or directory")
        return driver

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("posecrafter_rt.engines.device.cuda_driver", cuda_driver)
    finding = checks.check_devices()[-1]
    assert (finding.name, finding.status) == ("cuda", "absent") and finding.detail.startswith(told)


def test_the_table_shows_marks_and_mends(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [
        Finding("present", "ok", "version 1"),
        Finding("extra", "absent", "not installed", "pip install extra"),
        Finding("needed", "failed", "broken", "pip install needed"),
    ]
    monkeypatch.setattr(checks, "SECTIONS", {"parts": lambda: findings})
    result = run()
    assert result.exit_code == 1
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert lines[:6] == [
        ["parts"], ["ok", "present", "version", "1"], ["-", "extra", "not", "installed"], ["pip", "install", "extra"],
        ["FAILED", "needed", "broken"], ["pip", "install", "needed"],
    ]  # fmt: skip
    assert lines[6][0] == "1"


def test_what_is_optional_does_not_make_a_machine_unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SECTIONS", {"parts": lambda: [Finding("extra", "absent", "not installed")]})
    assert run().exit_code == 0


@pytest.mark.parametrize("error", [ImportError("no module named torch"), OSError("libcudart.so: cannot open\nmore")])
def test_a_broken_package_is_a_finding(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken() -> list[Finding]:
        raise error

    monkeypatch.setattr(checks, "SECTIONS", {"devices": broken, "rest": lambda: [Finding("x", "ok", "fine")]})
    sections = checks.run_checks()
    assert (sections["devices"][0].status, sections["devices"][0].mend) == (
        "failed",
        "in the checkout: pip install -e .",
    )
    assert sections["devices"][0].detail == str(error).splitlines()[0]
    assert sections["rest"][0].status == "ok"


def test_missing_packages_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "installed", lambda name: None)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    found = {finding.name: finding for finding in checks.check_packages()}
    assert (found["torch"].status, found["torch"].mend) == ("failed", "pip install torch")
    assert (found["rtmlib"].status, found["rtmlib"].mend) == ("absent", "pip install --no-deps rtmlib")
    assert (found["xformers"].status, found["xformers"].mend) == (
        "absent",
        "pip install xformers",
    )  # no TensorRT with it
    assert (found["triton"].status, found["triton"].mend) == ("absent", "pip install triton")
    assert (found["aiortc"].status, found["aiortc"].mend) == ("absent", "pip install 'posecrafter-rt[serve]'")


def test_what_has_no_build_for_this_processor_is_not_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "installed", lambda name: None)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    xformers = next(finding for finding in checks.check_packages() if finding.name == "xformers")
    told = ("absent", "it has no build for aarch64: tuning in less GPU memory", None)
    assert (xformers.status, xformers.detail, xformers.mend) == told


@pytest.mark.parametrize(
    ("wanted", "other"), [("opencv-python-headless", "opencv-python"), ("onnxruntime", "onnxruntime-gpu")]
)
def test_another_build_of_a_module_serves_as_well(monkeypatch: pytest.MonkeyPatch, wanted: str, other: str) -> None:
    def version(name: str) -> str:
        if name == other:
            return "4.10"
        raise checks.PackageNotFoundError(name)

    monkeypatch.setattr(checks, "version", version)
    assert checks.installed(wanted) == f"4.10 ({other})"
    assert checks.installed("torch") is None


@pytest.mark.parametrize(("free_bytes", "status"), [(10_000, "absent"), (10**12, "ok")])
def test_room_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_bytes: int, status: str) -> None:
    monkeypatch.setenv("POSECRAFTER_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free_bytes))
    cache = next(finding for finding in checks.check_storage() if finding.name == "cache")
    assert cache.status == status
    assert not (tmp_path / "not").exists()


def test_a_video_library_without_h264_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    def refuse(name: str, mode: str) -> None:
        raise ValueError(name)

    monkeypatch.setattr(av.codec, "Codec", refuse)
    assert checks.check_video()[0].status == "failed"


def test_what_is_not_built_names_the_command_that_builds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from posecrafter_rt.ops import native

    monkeypatch.setattr(native, "build_info", lambda: {})
    monkeypatch.setattr(native, "missing_reason", lambda: "it was not compiled")
    extension = next(finding for finding in checks.check_operators() if finding.name == "native extension")
    assert extension.mend == "install a C++ compiler and Python's headers, then in the checkout: pip install -e ."


@pytest.mark.parametrize("place", [f"{{}}/{'x' * 300}", "~nobody of this name/cache"], ids=["too long", "no home"])
def test_a_cache_that_cannot_be_reached_is_said_to_be_what_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    """The system refuses a name of this length to root, too, to whom it permits any folder."""
    from posecrafter_rt.engines import openvino_operations

    place = place.format(tmp_path)
    monkeypatch.setenv("POSECRAFTER_CACHE", place)
    monkeypatch.setattr(openvino_operations, "_built", openvino_operations._built.__wrapped__)  # found out anew
    base, cache = checks.check_storage()
    assert (base.name, base.status) == ("embedded base", "ok")
    assert cache.status == "failed" and "POSECRAFTER_CACHE" in str(cache.mend)
    assert place.rsplit("/", 1)[0] in cache.detail
    engines = {finding.name: finding for finding in checks.check_engines()}
    assert engines["openvino"].status == engines["auto"].status == "ok"
    if openvino_operations._fitting():
        assert "fp16 needs operations that cannot be had here: they cannot be kept: " in engines["openvino"].detail


def test_a_file_in_the_caches_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    monkeypatch.setenv("POSECRAFTER_CACHE", str(tmp_path / "cache"))
    cache = next(finding for finding in checks.check_storage() if finding.name == "cache")
    assert (cache.status, cache.detail) == ("failed", f"{tmp_path / 'cache'} is a file")
