"""Scripts that tests run in a process of their own: renders that are watched, and those from which memory or the disk is taken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# glibc otherwise keeps the addresses of what was freed, and where none are left reserves 64 MB at once for another heap:
# both count against a limit on addresses, though neither is memory.
FAITHFUL = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
ALONE = ("unshare", "--map-root-user", "--mount")  # with file systems of its own, and leave to mount them
# What the scripts below begin with: they render a pose file in a process of their own, because what a test run holds
# otherwise would hide what grows, and could not be taken away from it.
RENDER = """
import json, os, pkgutil, resource, sys
from pathlib import Path
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.rendering import render_to_files
from posecrafter_rt.runtime.options import RenderOptions

def around(target, before=lambda: None, after=lambda: None):
    owner, name = target.rsplit(".", 1)
    original = pkgutil.resolve_name(target)
    def wrapped(*arguments, **named):
        before()
        result = original(*arguments, **named)
        after()
        return result
    setattr(pkgutil.resolve_name(owner), name, wrapped)

def held_bytes(column):
    return int(Path("/proc/self/statm").read_text().split()[column]) * os.sysconf("SC_PAGE_SIZE")

def render(engine, poses, video, options):
    with Avatar.load(engine) as avatar:
        return render_to_files(avatar, PoseSequence.load(poses), Path(video), RenderOptions(**json.loads(options)))
"""
# Prints the report, and the resident memory at the end of every segment and after every frame of the video.
NOTED = f"""{RENDER}
seen = {{"posecrafter_rt.runtime.report.RenderReport.add": [], "posecrafter_rt.video_io.VideoWriter.write": []}}
for target, series in seen.items():
    around(target, after=lambda series=series: series.append(held_bytes(1)))
report = render(*sys.argv[1:])
print(json.dumps([report, *seen.values()]))
"""
# What a script may call from which memory is to be taken: all that the process has left but a megabyte, in which an error
# can be told; beyond that it gets so many bytes.
TAKE_MEMORY = """
import os, resource
taken = []

def take_memory(num_bytes):
    def held():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (held(), hard))
    for size in (1 << 20, 1 << 14):
        try:
            while True:
                taken.append(bytearray(size))
        except MemoryError:
            pass
    del taken[-64:]
    resource.setrlimit(resource.RLIMIT_AS, (held() + num_bytes, hard))
"""
# From the n-th call of a function on something else takes the memory of the process. Prints the report, or the error.
STARVED = f"""{RENDER}{TAKE_MEMORY}
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})  # every thread of an encoder takes memory of its own
target, moment, num_bytes, *arguments = sys.argv[1:]
calls = []

def starve():
    calls.append(1)
    if len(calls) == int(moment):
        take_memory(int(num_bytes))

around(target, before=starve)
try:
    print(json.dumps(render(*arguments)))
except PoseCrafterError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""
# For each number of kB, renders into a file system of so many that it alone sees, then into the same with more room. Prints
# of each run its exit status, what it said, and what it left there; the second one's outputs are copied to where they can be
# seen.
FULL = """
import json, shutil, subprocess, sys
from pathlib import Path
from typer.testing import CliRunner
from posecrafter_rt.cli.main import app

folder, copied, limits, *command = sys.argv[1:]
for num_kb in json.loads(limits):
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
    for size in (num_kb, 10_000):
        subprocess.run(["mount", "-o", f"remount,size={size}k", folder], check=True)
        result = CliRunner().invoke(app, [*command, "-o", f"{folder}/out.mp4"])
        files = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
        print(json.dumps([result.exit_code, result.stderr, files]))
    shutil.copytree(folder, f"{copied}/{num_kb}")
    subprocess.run(["umount", folder], check=True)
"""


def run_script(script: str, *arguments: object, environment: Mapping[str, str] = {}) -> Any:
    """Run one of the scripts above; returns what it printed."""
    (printed,), _ = run_lines([sys.executable, "-c", script], *arguments, environment=environment)
    return printed


def run_lines(command: Sequence[str], *arguments: object, environment: Mapping[str, str] = {}) -> tuple[list[Any], str]:
    """The same of a command: each line that it printed, and what it and its processes said otherwise."""
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=3600,
                          cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def refused_mount(folder: Path) -> str | None:
    """Why this process may mount nothing; None where it may."""
    if not shutil.which("unshare"):
        return "there is no unshare, with which Linux gives a process file systems of its own"
    done = subprocess.run([*ALONE, "mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, text=True)
    return None if done.returncode == 0 else f"no file system can be mounted: {done.stderr.strip()}"
