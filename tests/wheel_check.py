"""Run by `make wheel` in an environment that has the wheel and numpy alone: what was packed, and what imports.

Not a pytest file: it must run outside the repository and without its tools.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = {"posecrafter_rt": ".", "kernels": "kernels", "export": "export"}  # in the repository, in the package
PAGE_SOURCES = ("serve", "web")
IMPORTED = (
    "posecrafter_rt",
    "posecrafter_rt._native",
    "posecrafter_rt.export",
    "posecrafter_rt.kernels",
    "posecrafter_rt.poses.keypoints",
)


def files_of(folder: Path) -> set[Path]:
    """All files below a folder that a wheel must carry, relative to it: not what the page is built from."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path for path in files if path.suffix not in (".pyc", ".so") and path.parts[:2] != PAGE_SOURCES}


def main() -> None:
    """Exit with a message that names what is not as it should be."""
    for name in IMPORTED:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            sys.exit(f"{name} does not import from the wheel: {error}")
        if Path(sys.prefix) not in Path(str(module.__file__)).parents:
            sys.exit(f"{name} was imported from {module.__file__}, not from the wheel")
    package = importlib.import_module("posecrafter_rt")
    if version("posecrafter-rt") != package.__version__:
        sys.exit(f"the wheel is version {version('posecrafter-rt')}, the package {package.__version__}")
    home = Path(str(package.__file__)).parent
    for source, target in FOLDERS.items():
        missing = files_of(REPOSITORY / source) - files_of(home / target)
        if missing:
            sys.exit(f"not in the wheel: {', '.join(sorted(f'{source}/{path}' for path in missing))}")
    if home.joinpath(*PAGE_SOURCES).exists():
        sys.exit(f"in the wheel, but only to build the page from: {'/'.join(PAGE_SOURCES)}")
    print(f"posecrafter-rt {package.__version__} imports from a wheel, which holds {len(files_of(home))} files")


if __name__ == "__main__":
    main()
