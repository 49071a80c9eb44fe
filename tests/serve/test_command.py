"""The command as a process, with a real engine: it says where it is, serves the client that README shows, and ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import httpx
import pytest

from posecrafter_rt.avatar import Avatar

README = Path(__file__).parents[2] / "README.md"
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "POSECRAFTER_TOKEN"}


@contextlib.contextmanager
def command(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`posecrafter-rt serve` with arguments, on a free port."""
    call = [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
            "from posecrafter_rt.cli.main import main; main()", "serve", *arguments, "--port", "0"]  # fmt: skip
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], 240)
    assert ready, "it says nothing"
    return process.stdout.readline()


def end(process: subprocess.Popen[str], by: signal.Signals) -> tuple[int, str, str]:
    """Its status, and what it said, but that this machine is slow, as one may be that is busy with other things."""
    process.send_signal(by)
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, re.sub(r"^a frame comes \S+ s after its pose here, .*\n", "", stderr)


def documented_client() -> str:
    """README's, in its section `Live`."""
    live = README.read_text(encoding="utf-8").partition("\n## Live\n")[2].partition("\n## ")[0]
    return re.findall(r"<details>.*?```python\n(.*?)```\n\n</details>", live, re.DOTALL)[0]


def test_the_documented_client_is_short() -> None:
    assert len(documented_client().splitlines()) <= 40


def test_it_serves_the_documented_client_until_ctrl_c(tiny_engine: Path, tmp_path: Path) -> None:
    with Avatar.load(tiny_engine) as avatar:
        avatar.poses.save(tmp_path / "poses.json")
        num_poses = len(avatar.poses)
    (tmp_path / "client.py").write_text(documented_client())
    with command(str(tiny_engine), "--steps", "1", "--window", "2", "--json") as process:
        said = json.loads(first_line(process))
        assert said["backend"] == "torch" and (said["steps"], said["window"], said["size"]) == (1, 2, [32, 32])
        url = said["url"].replace("http", "ws") + "ws"
        call = [sys.executable, "client.py", url, "poses.json", "frames"]
        for _ in range(5):  # a machine that is busy with other things may show nothing in time
            client = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=240)
            assert client.returncode == 0 and '"type": "ready"' in client.stdout, client.stderr
            pictures = sorted((tmp_path / "frames").iterdir())
            if (tmp_path / "frames" / f"{num_poses:05}.jpg") in pictures:
                break
        assert re.search(r"frame of pose \d+: \d+ ms after", client.stdout)
        assert 1 <= len(pictures) <= num_poses and pictures[-1].name == f"{num_poses:05}.jpg"
        assert all(cv2.imread(str(picture)).shape == (32, 32, 3) for picture in pictures)
        assert httpx.get(said["url"] + "health").json()["status"] == "ok"
        code, stdout, stderr = end(process, signal.SIGINT)
    assert (code, stdout, stderr) == (0, "", "")


# A browser that takes a page, and then ends the server that started it.
BROWSER = """
import os, signal, sys, urllib.request
try:
    with urllib.request.urlopen(sys.argv[1], timeout=20) as page: print(page.status, flush=True)
finally:
    os.kill(os.getppid(), signal.SIGTERM)
"""


def test_a_browser_that_is_waited_for_gets_its_page(
    tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one in a terminal is: `webbrowser` returns when it has ended."""
    (tmp_path / "browser.py").write_text(BROWSER)
    monkeypatch.setitem(ENVIRONMENT, "BROWSER", f"{sys.executable} {tmp_path / 'browser.py'} %s")
    with command(str(tiny_engine), "--steps", "1", "--open") as process:
        stdout, stderr = process.communicate(timeout=240)
    assert re.fullmatch(r"serving \S+ at http://\S+ \(Ctrl-C ends it\)\n200\n", stdout), stderr
    assert process.returncode == 0


def test_termination_is_an_end_too_even_with_a_client(tiny_engine: Path) -> None:
    from websockets.sync.client import connect

    with command(str(tiny_engine), "--steps", "2", "--pipelined", "--token", "a secret of some length") as process:
        line = first_line(process)
        found = re.fullmatch(
            r"serving .*tiny\.engine at (http://127\.0\.0\.1:\d+/)\?token=(\S+) \(Ctrl-C ends it\)\n", line
        )
        assert found is not None, line
        assert httpx.get(found[1] + "api/info").status_code == 401
        with connect(f"{found[1].replace('http', 'ws')}ws?token={found[2]}") as client:
            assert json.loads(client.recv(timeout=30))["type"] == "ready"
            code, _, stderr = end(process, signal.SIGTERM)
    assert (code, stderr) == (0, "")
