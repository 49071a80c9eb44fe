"""`posecrafter-rt inspect`: what is in an engine folder or a tuned checkpoint.

Layer 8: arguments, one call, the printed result.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from posecrafter_rt import __version__
from posecrafter_rt.cli.output import print_heading, print_json, print_table, size_of
from posecrafter_rt.errors import EngineFolderError, PoseCrafterError

app = typer.Typer()

# Not shown, or shown in tables of their own; --json has them.
_LONG = ("files", "architecture", "configurations", "scheduler", "networks", "network_details")


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
    """Return the manifest, sizes of files and caches, and as `problem` the error that `open_folder` raises, if any.

    network_details: only for an intact engine of this version of the package; another version's networks may differ.
    Raises: EngineFolderError if the manifest was altered, because then what it says is not to be shown.
    """
    from posecrafter_rt.engines.description import describe_networks
    from posecrafter_rt.engines.folder import MUTABLE, open_folder, shared_bytes
    from posecrafter_rt.engines.manifest import is_sealed, read_manifest

    manifest = read_manifest(path)
    if not is_sealed(manifest):
        open_folder(path)  # raises the error
    record: dict[str, Any] = {"engine": str(path), **manifest}
    record["files"] = {
        name: (path / name).stat().st_size if (path / name).is_file() else None for name in manifest["files"]
    }
    record["bytes"] = sum(size or 0 for size in record["files"].values())
    record["shared_bytes"] = shared_bytes(path, manifest["files"])
    for name in MUTABLE:
        sizes = [file.stat().st_size for file in (path / name).rglob("*") if file.is_file()]
        record[name] = {"files": len(sizes), "bytes": sum(sizes)}
    try:
        folder = open_folder(path)
    except EngineFolderError as error:
        record["problem"] = error
    else:
        if manifest.get("package") == __version__:
            record["network_details"] = describe_networks(folder)
    return record


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says about itself, and how much it holds."""
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
    """Print the record as rows of name and value, and an engine's networks and files below."""
    print_table(flatten({name: value for name, value in record.items() if name not in _LONG}))
    if "network_details" in record:
        print_networks(record["network_details"])
    if "files" in record:
        print_heading("files")
        print_table((name, "missing" if size is None else size_of(size)) for name, size in record["files"].items())


def print_networks(networks: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a line for each network, with the first of its inputs and of its outputs."""
    noted = [name for name in ("plugins", "error") if any(name in network for network in networks.values())]
    rows = []
    for name, network in networks.items():
        told = {"plugins": f"{network['plugins']} of {network['attentions']}" if network.get("attentions") else "",
                "error": f"{network['error']:.1g}" if "error" in network else ""}  # fmt: skip
        shapes = [show_tensors(network[kind], network.get("limits", {})) for kind in ("inputs", "outputs")]
        rows.append((name, network["precision"], f"{network['weights']:,}", size_of(network["bytes"]),
                     *(told[name] for name in noted), *shapes))  # fmt: skip
    header = ("networks", "runs in", "weights", "size", *noted, "takes", "gives")
    print_table(rows, header)


def show_tensors(tensors: Mapping[str, Mapping[str, Any]], limits: Mapping[str, list[int]]) -> str:
    """Format the first of several tensors with its shape: `latents frames≤64×4×16×20, 15 more`."""
    (name, first), *others = tensors.items()
    shape = "×".join(f"{dim}≤{limits[dim][1]}" if dim in limits else str(dim) for dim in first["shape"])
    return f"{name} {shape}" + (f", {len(others)} more" if others else "")


def flatten(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested names, joined by a space, and readable values: `versions torch`, `2.13.0`."""
    for name, value in record.items():
        title = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, dict):
            yield from flatten(value, f"{title} ")
        elif name == "loras":
            yield from ((f"LoRA {one['file']}", f"scale {one['scale']:g}, SHA-256 {one['sha256']}") for one in value)
        elif name in ("bytes", "shared_bytes"):
            yield title.replace("bytes", "on disk"), size_of(value)
        else:
            yield title, value if isinstance(value, str) else json.dumps(value)
