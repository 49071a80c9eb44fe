"""What pyproject.toml, setup.py, the Makefile and the sources say of each other agrees.

Tests; `make wheel` builds and imports a real wheel, this is what can be told without building.
"""

from __future__ import annotations

import ast
import fnmatch
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from posecrafter_rt import __version__
from posecrafter_rt.cli import checks
from posecrafter_rt.cli.main import COMMANDS

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
MAX_EMBEDDED_BYTES = 30_000_000
MODULE_OF = {
    "opencv-python-headless": "cv2",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
    "sk-video": "skvideo",
    "tensorrt-cu13": "tensorrt",
}


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def constant(name: str) -> Any:
    """A literal that setup.py assigns, without running it."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py has no {name}")


def package_folders() -> dict[str, Path]:
    """Every folder with an __init__.py, by the name it is imported as."""
    roots = {"posecrafter_rt": ROOT / "posecrafter_rt"}
    roots |= {name: ROOT / folder for name, folder in constant("PACKAGE_DIR").items()}
    return {
        ".".join([name, *path.parent.relative_to(folder).parts]): path.parent
        for name, folder in roots.items()
        for path in folder.rglob("__init__.py")
    }


def distribution(requirement: str) -> str:
    """`triton>=3.2; sys_platform == 'linux'` → `triton`."""
    return re.split(r"[<>=!~;\[ ]", requirement, maxsplit=1)[0]


def test_setup_lists_every_package() -> None:
    assert sorted(constant("PACKAGES")) == sorted(package_folders())


def test_every_python_file_is_in_a_package() -> None:
    folders = set(package_folders().values())
    stray = {path for root in ("posecrafter_rt", "kernels", "export") for path in (ROOT / root).rglob("*.py")}
    stray = {path for path in stray if path.parent not in folders}
    assert not stray


def test_every_data_file_is_packed(pyproject: dict[str, Any]) -> None:
    patterns = pyproject["tool"]["setuptools"]["package-data"]
    homes = {"posecrafter_rt": ROOT / "posecrafter_rt"}
    homes |= {name: ROOT / folder for name, folder in constant("PACKAGE_DIR").items()}
    for name, home in homes.items():
        files = [path for path in home.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".so")]
        for path in files:
            relative = path.relative_to(home)
            if relative.parts[:2] == ("serve", "web"):
                continue  # what the page is built from
            package = f"{name}.serve" if relative.parts[:2] == ("serve", "static") else name
            wanted = [pattern.removeprefix("static/").removeprefix("**/") for pattern in patterns.get(package, ())]
            assert any(fnmatch.fnmatch(path.name, pattern or "*") for pattern in wanted), f"{relative} is not packed"


def test_the_embedded_base_is_small() -> None:
    base = ROOT / "posecrafter_rt" / "embedded" / "base"
    assert sum(path.stat().st_size for path in base.rglob("*") if path.is_file()) <= MAX_EMBEDDED_BYTES


def test_doctor_knows_every_dependency(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    assert {distribution(line) for line in project["dependencies"]} == set(checks.CORE)
    extras = project["optional-dependencies"]
    for name, (extra, _) in checks.OPTIONAL.items():
        assert name in {distribution(line) for line in extras[extra]}, name
    run_time = {distribution(line) for extra in ("cuda", "poses", "mediapipe", "demo", "serve", "camera")
                for line in extras[extra]}  # fmt: skip
    assert run_time <= set(checks.OPTIONAL) | set(checks.CORE)


def test_every_import_is_declared(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    modules = {MODULE_OF.get(name, name.replace("-", "_")) for name in map(distribution, lines)}
    for root in ("posecrafter_rt", "kernels", "export"):
        for path in (ROOT / root).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                foreign = {name.split(".")[0] for name in names} - {"posecrafter_rt", *sys.stdlib_module_names}
                assert foreign <= modules, f"{path.relative_to(ROOT)} imports {foreign - modules}"


def test_torch_is_a_range_in_the_metadata_and_a_choice_in_the_makefile(pyproject: dict[str, Any]) -> None:
    assert "torch>=2.7" in pyproject["project"]["dependencies"]
    assert re.search(r"^TORCH \?= torch==[\d.]+$", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_tools_are_pinned_once(pyproject: dict[str, Any]) -> None:
    tools = {"pytest", "hypothesis", "ruff", "mypy", "clang-format", "build"}
    extras = pyproject["project"]["optional-dependencies"]
    pinned = [distribution(line) for lines in extras.values() for line in lines if "==" in line]
    assert sorted(name for name in pinned if name in tools) == sorted(tools)
    for other in ("Makefile", ".ci/run"):
        assert not re.search(r"(pytest|ruff|mypy|clang-format)==", (ROOT / other).read_text())


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make on the PATH")
@pytest.mark.parametrize("has_tracker", [True, False])
def test_make_wheel_says_where_it_leaves_out_the_tracker(tmp_path: Path, has_tracker: bool) -> None:
    if has_tracker:
        (tmp_path / "tracker").mkdir()
    built = ["-o", "none/.stamps/wheel", "VENV=none"]  # as if there were a wheel, so that none is built
    command = ["make", "--silent", *built, f"STATIC={tmp_path}", "wheel"]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert ("tracker" in said and "make web" in said) is not has_tracker


def test_the_changelog_knows_this_version() -> None:
    assert re.search(rf"^## {re.escape(__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_module(name: str) -> None:
    assert (ROOT / "posecrafter_rt" / "cli" / f"{name.replace('-', '_')}.py").is_file()


def test_every_source_file_opens_with_its_job_and_layer() -> None:
    for root in ("posecrafter_rt", "kernels", "export"):
        for path in (ROOT / root).rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            doc = ast.get_docstring(ast.parse(source)) or ""
            assert doc or not source.strip(), f"{path.relative_to(ROOT)} does not say what it is for"
