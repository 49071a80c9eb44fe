"""`posecrafter-rt serve` before it serves: what it refuses, in one line and a hint, without loading anything slow."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from posecrafter_rt.cli import serve as serve_module
from posecrafter_rt.cli.main import app
from posecrafter_rt.poses.keypoints import PoseSequence


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POSECRAFTER_TOKEN", raising=False)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["serve", *arguments])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7"])
def test_beyond_this_machine_a_token_is_demanded(host: str) -> None:
    result = run("me.engine", "--host", host)
    assert result.exit_code == 1 and "token" in result.stderr and "hint: add --token" in result.stderr


def test_what_the_environment_holds_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POSECRAFTER_TOKEN", "a secret of some length")
    result = run(str(tmp_path / "no.engine"), "--host", "0.0.0.0", "--port", "0")
    assert result.exit_code == 1 and "no.engine is not an engine folder" in result.stderr


def test_an_empty_token_is_no_token_that_was_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSECRAFTER_TOKEN", "")
    result = run("me.engine")
    assert result.exit_code == 1 and "the token is empty" in result.stderr


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        result = run(str(tmp_path / "no.engine"), "--port", port)
    assert result.exit_code == 1 and result.stderr.startswith(f"error: port {port} is in use\nhint: ")


def test_a_host_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    result = run(str(tmp_path / "no.engine"), "--host", "127.0.0.1.invalid", "--token", "a secret")
    assert result.exit_code == 1 and "no host '127.0.0.1.invalid'" in result.stderr


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "websockets", "prometheus_client"])
def test_a_missing_package_is_one_line(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(sys.modules):
        if name == package or name.startswith((f"{package}.", "posecrafter_rt.serve.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    result = run(str(tmp_path / "no.engine"), "--port", "0")
    assert result.exit_code == 1
    assert result.stderr == f"error: serving needs the package {package}\nhint: pip install 'posecrafter-rt[serve]'\n"


def test_missing_calibration_poses_are_one_line(tmp_path: Path) -> None:
    result = run(str(tmp_path / "no.engine"), "--port", "0", "--calibration", str(tmp_path / "no.json"))
    assert result.exit_code == 1 and "no.json" in result.stderr and "Traceback" not in result.stderr


def test_calibration_takes_the_frames_that_show_somebody(
    tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[dict[str, Any]] = []
    monkeypatch.setattr(serve_module, "_run", lambda application, *others: (
        served.append(dict(application.state.service.options.stream))))  # fmt: skip
    keypoints = np.random.default_rng(0).uniform(1, 30, (4, 134, 3)).astype(np.float32)
    keypoints[..., 2], keypoints[1] = 1, 0
    keypoints[2, :, 2] = 0.2  # too little for Eq. 5
    PoseSequence(keypoints, (32, 32)).save(tmp_path / "poses.json")
    command = (str(tiny_engine), "--port", "0", "--calibration", str(tmp_path / "poses.json"))
    assert run(*command).exit_code == 0
    np.testing.assert_allclose(served.pop()["calibration"].keypoints, keypoints[[0, 3]], atol=0.01)
    for frame, told in ((1, "no person in any of 1 frames"), (2, "no frame has a keypoint of confidence 0.3 or more")):
        PoseSequence(keypoints[[frame]], (32, 32)).save(tmp_path / "poses.json", force=True)
        result = run(*command)
        assert result.exit_code == 1 and told in result.stderr and "hint: " in result.stderr and not served


@pytest.mark.parametrize("arguments", [("--max-sessions", "0"), ("--token", " "), ("--token", "")])
def test_bad_options_have_a_hint(arguments: tuple[str, ...]) -> None:
    result = run("me.engine", *arguments)
    assert result.exit_code == 1 and "hint: " in result.stderr


def test_a_preset_and_what_overrules_it_reach_the_stream(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[dict[str, Any]] = []
    monkeypatch.setattr(serve_module, "_run", lambda application, *others: (
        served.append(dict(application.state.service.options.stream))))  # fmt: skip
    for arguments, stream in (((), {"preset": "balanced"}),
                              (("--preset", "quality", "--steps", "3"), {"preset": "quality", "steps": 3})):  # fmt: skip
        assert run(str(tiny_engine), "--port", "0", *arguments).exit_code == 0
        assert served.pop() == stream


def test_an_unknown_preset_is_one_line(tiny_engine: Path) -> None:
    result = run(str(tiny_engine), "--port", "0", "--preset", "exact")  # a render's
    assert result.exit_code == 1
    assert result.stderr == "error: unknown preset 'exact'\nhint: choose one of fast, balanced, quality\n"


def test_what_cannot_be_streamed_is_one_line(tiny_engine: Path) -> None:
    result = run(str(tiny_engine), "--port", "0", "--steps", "99")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ") and "99" in result.stderr and "hint: " in result.stderr
    assert "Traceback" not in result.stderr


def test_an_engine_that_is_not_there(tmp_path: Path) -> None:
    result = run(str(tmp_path / "no.engine"), "--port", "0")
    assert result.exit_code == 1 and "no.engine" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(("host", "token", "url"), [
    ("127.0.0.1", None, "http://127.0.0.1:80/"), ("::1", None, "http://[::1]:80/"),
    ("localhost", "a&b", "http://localhost:80/?token=a%26b"), ("0.0.0.0", None, f"http://{socket.gethostname()}:80/"),
])  # fmt: skip
def test_the_address_can_be_followed(host: str, token: str | None, url: str) -> None:
    assert serve_module._url(host, 80, token) == url
