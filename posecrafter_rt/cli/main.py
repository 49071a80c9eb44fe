"""`posecrafter-rt`: finds the command that was asked for, and turns errors into one line and an exit code.

Layer 8: imports no command and no torch until a command is called, so that `--help` is quick.
"""

from __future__ import annotations

import errno
import os
import sys
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup
from typer.main import get_group

from posecrafter_rt import __version__
from posecrafter_rt.errors import DiskFull, OutOfMemory, PoseCrafterError, out_of_memory

# Each is a module of this folder (`-` becomes `_`) with a Typer called `app` that has one command or several.
COMMANDS = {
    "demo": "The whole path on real footage: tune, build, render, measure.",
    "poses": "Keypoints: extract, preview, retarget, edit.",
    "tune": "Tune the base on a few frames of one person; writes tuned.ckpt.",
    "build-engine": "Turn a tuned.ckpt into an engine folder.",
    "render": "Render a pose sequence with an engine into a video.",
    "serve": "The live avatar: a page in the browser, a WebSocket for apps, a camera for meetings.",
    "eval": "PSNR and SSIM of a rendered video against the true one; with --poses the error of its poses.",
    "inspect": "Show what an engine folder or a tuned.ckpt holds.",
    "doctor": "What this machine can run, and how to fix what it cannot.",
}
INTERRUPTED = 130
GOES_ON = "posecrafter_rt.goes_on"  # in a context's `meta`: whether the same command would go on, not start over


class Commands(TyperGroup):
    """The commands by name. A module is imported when its command is called, and errors end here."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        for argument in args:
            try:
                argument.encode()
            except UnicodeEncodeError:  # neither safetensors nor a terminal takes such a name
                ctx.fail(f"{argument!r} is not UTF-8; give the file another name")
        options = args[: args.index("--")] if "--" in args else args
        if "--debug" in options:  # in any place: people add it to the command that failed
            args = ["--debug", *(option for option in options if option != "--debug"), *args[len(options) :]]
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if name else None, rest

    def invoke(self, ctx: Any) -> Any:
        if ctx.params["debug"]:
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except PoseCrafterError as error:
            message, hint = str(error), error.hint
        except KeyboardInterrupt:
            purpose = "go on" if ctx.meta.get(GOES_ON) else "start over"
            fail(f"interrupted; run the same command again to {purpose}", label=None, code=INTERRUPTED)
        except BrokenPipeError:
            raise
        except Exception as error:  # OpenCV has a class of its own
            known = explain(error)
            if known is None:
                raise
            message, hint = str(known), known.hint
        fail(message, hint)  # only here: a handled error keeps all its frames, and memory may have run out


def load_command(name: str) -> Any:
    """Return the Click command of a module's `app`: its only command, or the group of all."""
    group = get_group(import_module(f"posecrafter_rt.cli.{name.replace('-', '_')}").app)
    return next(iter(group.commands.values())) if len(group.commands) == 1 else group


def explain(error: Exception) -> PoseCrafterError | None:
    """Return the error to show if memory ran out or the file system failed; None for any other, which is our bug.

    A file-system error counts only if it names a file, if the disk is full, or if there is no place for temporary files.
    """
    free_some = "free some memory and run the same command again"
    if not isinstance(error, OSError):
        return out_of_memory(error, free_some)
    place = "" if error.filename is None else f": {os.fsdecode(error.filename)}"
    if error.errno == errno.ENOMEM:
        return OutOfMemory(f"memory ran out{place}", free_some)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"no space left on the disk{place}", hint="free some space and run the same command again")
    if error.strerror is None:
        return None
    said = f"{error.strerror[:1].lower()}{error.strerror[1:]}"
    if said.startswith("no usable temporary directory"):  # `tempfile` says which ones it has tried
        return PoseCrafterError(said, "free some space, or set TMPDIR to a folder that can be written")
    return None if error.filename is None else PoseCrafterError(f"{said}{place}")


def heed_quota() -> None:
    """Let torch start no more threads than a quota of cores pays for, which it does not know; this imports torch.

    Commands that compute with torch call it. A library must leave a program's threads alone.
    """
    import torch

    from posecrafter_rt.machine import core_quota

    quota = core_quota()
    if quota is not None and quota < torch.get_num_threads():
        torch.set_num_threads(quota)


def fail(message: str, hint: str | None = None, *, label: str | None = "error", code: int = 1) -> NoReturn:
    """Print `error: …` and `hint: …` on standard error and end the command with `code`."""
    for title, style, text in ((label, "bold red", message), ("hint", "bold cyan", hint)):
        if text is not None:
            _print(f"{title}: " if title else "", style, text)
    raise typer.Exit(code)


def _print(title: str, style: str, text: str) -> None:
    try:
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True, highlight=False, soft_wrap=True).print(Text(title, style), Text(text), sep="")
    except MemoryError:  # even this needs more memory than is left
        print(title, text, sep="", file=sys.stderr)


def print_version(wanted: bool) -> None:
    """Print the version; this is the callback of --version."""
    if wanted:
        print(f"posecrafter-rt {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """Tune a video avatar on a few frames of one person, then render it from poses."""


for _name, _help in COMMANDS.items():
    app.command(_name, help=_help)(lambda: None)  # only listed: Commands.resolve_command puts the real one in its place


def main() -> None:
    """Run the command line; ends with SystemExit: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    if sys.platform == "win32":  # where commands would end at the first module that Windows lacks
        sys.exit("error: posecrafter-rt does not run on Windows; use WSL 2")
    try:
        try:
            app(prog_name="posecrafter-rt")
        finally:
            if sys.stdout is not None:  # as it is where the command was started with a closed one
                sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output is gone; without this Python complains once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
