"""Tests of the command line's frame: errors in one line, exit codes, help.

Tests; commands are stand-ins, put where `main` looks for the real ones.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from posecrafter_rt import __version__
from posecrafter_rt.cli.main import COMMANDS, app
from posecrafter_rt.errors import PoseCrafterError


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command line with `action` as the command `inspect`."""

    def call(*arguments: str, action: Callable[[], None] = lambda: None) -> Result:
        stand_in = typer.Typer()

        @stand_in.command()
        def inspect(count: int = 1) -> None:
            action()

        monkeypatch.setitem(sys.modules, "posecrafter_rt.cli.inspect", SimpleNamespace(app=stand_in))
        return CliRunner().invoke(app, list(arguments))

    return call


def raising(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def test_help_lists_every_command(run: Callable[..., Result]) -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in COMMANDS)


def test_version(run: Callable[..., Result]) -> None:
    result = run("--version")
    assert (result.exit_code, result.output) == (0, f"posecrafter-rt {__version__}\n")


def test_a_command_runs_and_has_its_own_help(run: Callable[..., Result]) -> None:
    done = []
    assert run("inspect", action=lambda: done.append(1)).exit_code == 0
    assert done == [1]
    assert "--count" in run("inspect", "--help").output


@pytest.mark.parametrize("arguments", [("inspekt",), ("inspect", "--count", "many"), ("inspect", "--nothing"), ()])
def test_bad_usage_is_exit_code_2(run: Callable[..., Result], arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_a_misspelt_command_gets_a_suggestion(run: Callable[..., Result]) -> None:
    assert "'inspect'" in run("inspekt").stderr


def test_an_error_is_two_lines_on_stderr(run: Callable[..., Result]) -> None:
    result = run("inspect", action=raising(PoseCrafterError("tau 99 is not a step", hint="give 1 to 50 [steps]")))
    assert result.exit_code == 1
    assert result.stderr == "error: tau 99 is not a step\nhint: give 1 to 50 [steps]\n"
    assert result.stdout == ""


def test_a_long_error_is_not_wrapped(run: Callable[..., Result]) -> None:
    message = "a long word, " * 30
    assert run("inspect", action=raising(PoseCrafterError(message))).stderr == f"error: {message}\n"


@pytest.mark.parametrize("arguments", ["--debug inspect", "inspect --debug", "inspect --debug --count 2"])
def test_debug_shows_the_traceback_wherever_it_stands(run: Callable[..., Result], arguments: str) -> None:
    error = PoseCrafterError("tau 99")
    assert run(*arguments.split(), action=raising(error)).exception is error


def test_what_follows_two_dashes_is_no_option(run: Callable[..., Result]) -> None:
    assert run("inspect", "--", "--debug").exit_code == 2


def test_an_interrupt_says_how_to_go_on(run: Callable[..., Result]) -> None:
    result = run("inspect", action=raising(KeyboardInterrupt()))
    assert result.exit_code == 130
    assert result.stderr == "interrupted; run the same command again to start over\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line(run: Callable[..., Result], number: int) -> None:
    result = run("inspect", action=raising(OSError(number, os.strerror(number), "out.mp4")))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no space left on the disk: out.mp4\nhint: ")


def test_a_file_that_cannot_be_opened_is_one_line(run: Callable[..., Result]) -> None:
    result = run("inspect", action=lambda: open("/no/such/file").close())
    assert (result.exit_code, result.stderr) == (1, "error: no such file or directory: /no/such/file\n")


def test_no_place_for_temporary_files_is_one_line(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/no/such/place"])
    result = run("inspect", action=lambda: tempfile.TemporaryFile().close())
    assert result.exit_code == 1
    assert result.stderr == (
        "error: no usable temporary directory found in ['/no/such/place']\n"
        "hint: free some space, or set TMPDIR to a folder that can be written\n"
    )


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("can't start new thread"), OSError(errno.ENOMEM, "Cannot allocate memory"),
    Exception("OpenCV: (-4:Insufficient memory) Failed to allocate")])  # fmt: skip
def test_memory_that_runs_out_is_one_line(run: Callable[..., Result], error: Exception) -> None:
    """Where no render explains it: while an engine is loaded, say, or a contact sheet is drawn."""
    result = run("inspect", action=raising(error))
    said = "" if isinstance(error, (MemoryError, OSError)) else f": {error}"
    assert result.stderr == f"error: memory ran out{said}\nhint: free some memory and run the same command again\n"
    assert result.exit_code == 1


@pytest.mark.parametrize("error", [MemoryError(), PoseCrafterError("tau 99")])
def test_what_a_command_held_is_free_when_its_error_is_said(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    class Frames:
        """What takes memory."""

    kept: list[weakref.ref[Frames]] = []
    held_then: list[bool] = []

    def action() -> None:
        frames = Frames()
        kept.append(weakref.ref(frames))
        raise type(error)(*error.args)

    monkeypatch.setattr("posecrafter_rt.cli.main._print", lambda *line: held_then.append(kept[0]() is not None))
    run("inspect", action=action)
    assert held_then and not any(held_then)


def test_an_error_is_said_even_where_rich_has_no_memory(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def starved(*given: object, **named: object) -> None:
        raise MemoryError

    monkeypatch.setattr("rich.console.Console.__init__", starved)
    result = run("inspect", action=raising(PoseCrafterError("tau 99", "say 1 to 50")))
    assert (result.exit_code, result.stderr) == (1, "error: tau 99\nhint: say 1 to 50\n")


def test_what_only_sounds_like_it_is_not_taken_for_it(run: Callable[..., Result]) -> None:
    """A library that is loaded too late says so whatever memory there is."""
    error = ImportError("libgomp.so.1: cannot allocate memory in static TLS block")
    assert run("inspect", action=raising(error)).exception is error


@pytest.mark.parametrize("error", [OSError("odd"), RuntimeError("a bug"), ValueError("a bug")])
def test_a_bug_keeps_its_traceback(run: Callable[..., Result], error: Exception) -> None:
    assert run("inspect", action=raising(error)).exception is error


@pytest.mark.parametrize("command", [
    "tune none.mp4 --poses none.json", "build-engine none.ckpt", "render none.engine --poses none.json",
    "serve none.engine --port 0", "demo -o a_file"])  # fmt: skip
def test_no_command_starts_more_threads_than_a_quota_of_cores_pays_for(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, two_threads: None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    monkeypatch.setattr("posecrafter_rt.machine.core_quota", lambda: 3)
    assert CliRunner().invoke(app, command.split()).exit_code == 1 and torch.get_num_threads() == 2
    monkeypatch.setattr("posecrafter_rt.machine.core_quota", lambda: 1)
    assert CliRunner().invoke(app, command.split()).exit_code == 1 and torch.get_num_threads() == 1


def test_on_windows_the_command_says_what_to_do_and_misses_no_module() -> None:
    """It has neither `fcntl` nor `resource`."""
    code = ("import sys; sys.modules |= {'fcntl': None, 'resource': None}; from posecrafter_rt.cli.main import main;"
            "sys.platform = 'win32'; main()")  # fmt: skip
    ran = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True)
    expected = (1, "", "error: posecrafter-rt does not run on Windows; use WSL 2\n")
    assert (ran.returncode, ran.stdout, ran.stderr) == expected


def test_a_reader_that_leaves_early_causes_no_noise() -> None:
    command = f"{sys.executable} -m posecrafter_rt --help | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


@pytest.mark.parametrize("wanted", ["--version", "--help"])
def test_a_closed_standard_output_is_no_failure(wanted: str) -> None:
    command = f"{sys.executable} -m posecrafter_rt {wanted} >&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_color_is_obeyed() -> None:
    command = [sys.executable, "-m", "posecrafter_rt", "--help"]
    shared = {**os.environ, "TERM": "xterm-256color"}
    coloured, plain = (
        subprocess.run(command, capture_output=True, text=True, timeout=60, env={**shared, **extra}).stdout
        for extra in ({"FORCE_COLOR": "1"}, {"FORCE_COLOR": "1", "NO_COLOR": "1"})
    )
    assert "\x1b[1;36m" in coloured
    assert "36m" not in plain


def test_ctrl_c_in_a_real_process() -> None:
    code = (
        "import signal, sys, time, types, typer\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background inherits none
        "app = typer.Typer()\n"
        "@app.command()\n"
        "def inspect() -> None:\n"
        "    print('started', flush=True)\n"
        "    time.sleep(60)\n"
        "sys.modules['posecrafter_rt.cli.inspect'] = types.SimpleNamespace(app=app)\n"
        "sys.argv = ['posecrafter-rt', 'inspect']\n"
        "from posecrafter_rt.cli.main import main\n"
        "main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "started\n"
        time.sleep(0.1)  # the line is printed just before the sleep begins
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stderr == "interrupted; run the same command again to start over\n"
