"""`posecrafter-rt inspect`: what is in an engine folder or a tuned checkpoint.

Layer 8: arguments, one call, the printed result.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from posecrafter_rt.cli.output import print_heading, print_json, print_table, size_of
from posecrafter_rt.errors import EngineFolderError, PoseCrafterError

app = typer.Typer()

_LONG = ("files", "architecture", "scheduler")  # for the program, not for reading; --json has them


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="An engine folder or a tuned.ckpt.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what an engine folder or a tuned.ckpt holds; every file of an engine is verified."""
    if not path.exists():
        raise PoseCrafterError(f"there is no {path}", hint="give an engine folder or a tuned.ckpt")
    record = describe_engine(path) if path.is_dir() else describe_checkpoint(path)
    problem: PoseCrafterError | None = record.pop("problem", None)
    if as_json:
        print_json({**record, "intact": problem is None})
    else:
        print_record(record)
    if problem is not None:
        raise problem


def describe_engine(path: Path) -> dict[str, Any]:
    """The manifest, sizes of files and caches, and under `problem` the error that `open_folder` raises, if any."""
    from posecrafter_rt.engines.folder import MUTABLE, open_folder, read_manifest

    manifest = read_manifest(path)
    record: dict[str, Any] = {"engine": str(path), **manifest}
    record["files"] = {
        name: (path / name).stat().st_size if (path / name).is_file() else None for name in manifest["files"]
    }
    record["bytes"] = sum(size or 0 for size in record["files"].values())
    for name in MUTABLE:
        sizes = [file.stat().st_size for file in (path / name).rglob("*") if file.is_file()]
        record[name] = {"files": len(sizes), "bytes": sum(sizes)}
    try:
        open_folder(path)
    except EngineFolderError as error:
        record["problem"] = error
    return record


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, and how much it holds."""
    from posecrafter_rt.checkpoint import Checkpoint

    checkpoint = Checkpoint.load(path)
    return {
        "checkpoint": str(path),
        "bytes": path.stat().st_size,
        "digest": checkpoint.digest(),
        "training_frames": len(checkpoint.frames),
        "tensors": len(checkpoint.tensors),
        "parameters": sum(tensor.numel() for tensor in checkpoint.tensors.values()),
        **checkpoint.metadata,
    }


def print_record(record: dict[str, Any]) -> None:
    """The record as rows of name and value, and an engine's files below."""
    print_table(flatten({name: value for name, value in record.items() if name not in _LONG}))
    if "files" in record:
        print_heading("files")
        print_table((name, "missing" if size is None else size_of(size)) for name, size in record["files"].items())


def flatten(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested names joined by a space, values for reading: `versions torch`, `2.13.0`."""
    for name, value in record.items():
        title = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, dict):
            yield from flatten(value, f"{title} ")
        elif name == "loras":
            yield from ((f"LoRA {one['file']}", f"scale {one['scale']:g}, SHA-256 {one['sha256']}") for one in value)
        elif name == "bytes":
            yield title.replace("bytes", "size"), size_of(value)
        else:
            yield title, value if isinstance(value, str) else json.dumps(value)
