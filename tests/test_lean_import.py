"""Importing is cheap and pure: no torch, no flags, and a quick `--help`.

Tests; each in a process of its own, because this one has imported everything already.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "cv2", "av", "diffusers", "transformers", "onnx", "onnxruntime", "openvino", "triton", "numpy")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_after(statement: str) -> set[str]:
    """Names of all modules that a statement brings into a fresh interpreter."""
    code = f"import sys, json\nbefore = set(sys.modules)\n{statement}\n"
    code += "print(json.dumps(sorted(set(sys.modules) - before)))"
    return set(json.loads(run_python(code).splitlines()[-1]))


def heavy_after(statement: str) -> set[str]:
    return modules_after(statement) & set(HEAVY)


def test_the_package_imports_almost_nothing() -> None:
    modules = modules_after("import posecrafter_rt")
    assert not modules & set(HEAVY)
    assert {name for name in modules if name.startswith("posecrafter_rt")} == {"posecrafter_rt"}
    assert len(modules) < 30, sorted(modules)


@pytest.mark.parametrize("module", ["errors", "config", "spec", "atomic", "machine"])
def test_leaves_import_nothing_heavy(module: str) -> None:
    assert not heavy_after(f"import posecrafter_rt.{module}")


@pytest.mark.parametrize("module", ["poses", "poses.draw", "video_io", "framing"])
def test_poses_and_frames_need_no_torch(module: str) -> None:
    assert heavy_after(f"import posecrafter_rt.{module}") <= {"numpy", "cv2", "av"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_the_command_line_answers_without_anything_heavy(arguments: list[str]) -> None:
    call = f"from posecrafter_rt.cli.main import app\ntry:\n    app({arguments!r})\n"
    call += "except SystemExit as end:\n    assert not end.code"
    assert not heavy_after(call)


def test_what_a_render_is_measured_in_imports_no_rival() -> None:
    assert not heavy_after("import bench.contenders") & {"diffusers", "transformers", "onnx"}


def test_command_modules_import_nothing_slow() -> None:
    """`posecrafter-rt COMMAND --help` is quick too: torch comes when a command runs."""
    call = "from posecrafter_rt.cli.main import COMMANDS, load_command\nfor name in COMMANDS: load_command(name)"
    assert heavy_after(call) <= {"numpy"}


def test_importing_sets_no_flags() -> None:
    code = (
        "import os, sympy, torch, warnings\n"  # torch imports sympy late, which adds a filter for its own warnings
        "theirs = {'LD_LIBRARY_PATH', 'TORCHINDUCTOR_CACHE_DIR'}  # set by OpenCV 5, and by torch, as they are imported\n"
        "def state():\n"
        "    return (torch.get_num_threads(), torch.get_default_dtype(), torch.backends.cuda.matmul.allow_tf32,\n"
        "            torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(), torch.is_grad_enabled(),\n"
        "            torch.cuda.is_initialized(), torch.initial_seed(), {name: value for name, value in os.environ.items() if name not in theirs},\n"
        "            list(warnings.filters))\n"
        "before = state()\n"
        "import posecrafter_rt, posecrafter_rt.ops, posecrafter_rt.method, posecrafter_rt.poses\n"
        "changed = [index for index, pair in enumerate(zip(before, state())) if pair[0] != pair[1]]\n"
        "assert not changed, changed\n"
    )
    run_python(code)


def test_public_names_resolve() -> None:
    import posecrafter_rt

    for name in posecrafter_rt.__all__:
        assert getattr(posecrafter_rt, name) is not None and name in dir(posecrafter_rt), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    import posecrafter_rt

    with pytest.raises(AttributeError, match="nothing_of_ours"):
        _ = posecrafter_rt.nothing_of_ours
