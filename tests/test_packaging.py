"""What pyproject.toml, setup.py, the Makefile and the sources say of each other agrees.

Tests; `make wheel` builds and imports a real wheel, this is what can be told without building.
"""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from posecrafter_rt import __version__
from posecrafter_rt.cli import checks
from posecrafter_rt.cli.main import COMMANDS

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


# Prints what setuptools would pack beside the code: run where setup.py is, as a build does.
LIST_DATA = """
import sys
from setuptools import Distribution
packages, package_dir = {packages!r}, {package_dir!r}
distribution = Distribution({{"packages": packages, "package_dir": package_dir}})
distribution.parse_config_files(["pyproject.toml"])
command = distribution.get_command_obj("build_py")
command.ensure_finalized()
print(*(f"{{folder}}/{{file}}" for _, folder, _, files in command.data_files for file in files), sep="\\n")
"""


def test_what_the_page_is_built_from_is_not_packed(tmp_path: Path) -> None:
    """Nor what `make web` installs there."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    kept = ("serve/static/index.html", "spec.json", "engines/operations/linear.cpp")
    web = ("serve/web/package.json", "serve/web/tracker-notice.txt", "serve/web/node_modules/vite/package.json")
    for name in (*kept, *web, "serve/__init__.py", "__init__.py", "kernels/table.json"):
        file = tmp_path / "posecrafter_rt" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('__version__ = "1"' if name == "__init__.py" else "")
    (tmp_path / "README.md").touch()
    (tmp_path / "LICENSE").touch()
    script = LIST_DATA.format(packages=["posecrafter_rt", "posecrafter_rt.serve"], package_dir={})
    said = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True)
    packed = {line.split("posecrafter_rt/", 1)[1] for line in said.stdout.splitlines()}
    assert packed >= set(kept) and not packed & set(web), packed


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


def test_the_extra_for_gpus_leaves_out_what_has_no_build_for_arm(pyproject: dict[str, Any]) -> None:
    """It would fail as a whole; doctor's condition is the same."""
    assert "xformers; platform_machine == 'x86_64'" in pyproject["project"]["optional-dependencies"]["cuda"]


def test_doctor_installs_mediapipe_in_an_environment_of_its_own(pyproject: dict[str, Any]) -> None:
    (pinned,) = pyproject["project"]["optional-dependencies"]["mediapipe"]
    environment, install, use = re.split(" && |; then ", checks.MENDS["mediapipe"])
    assert environment == "python -m venv detector" and install == f"detector/bin/pip install {pinned}"
    assert use == "`poses extract --python detector/bin/python`"


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


def test_the_least_python_is_the_same_everywhere(pyproject: dict[str, Any]) -> None:
    least = pyproject["project"]["requires-python"].removeprefix(">=")
    minor = least.removeprefix("3.")
    assert [pyproject["tool"][tool][setting] for tool, setting in (("mypy", "python_version"), ("ruff", "target-version"))] == [
        least, f"py3{minor}"]  # fmt: skip
    listed = [line.rpartition(" ")[2] for line in pyproject["project"]["classifiers"] if ":: Python :: 3." in line]
    assert listed[0] == least
    assert f"Python ≥ {least}," in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Python {least} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"sys.version_info < (3, {minor})" in (ROOT / "Makefile").read_text()


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


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make on the PATH")
def test_make_clean_has_what_it_removes_made_again_and_keeps_the_demonstration(tmp_path: Path) -> None:
    stamps = tmp_path / ".venv" / ".stamps"
    for folder in (stamps, tmp_path / "demo", tmp_path / "build", tmp_path / "posecrafter_rt"):
        folder.mkdir(parents=True)
    for file in (
        "demo/tuned.ckpt",
        "posecrafter_rt/_native.so",
        *(f".venv/.stamps/{name}" for name in ("torch", "demo", "dev", "wheel")),
    ):
        (tmp_path / file).touch()
    command = ["make", "--silent", "-f", ROOT / "Makefile", "clean", "CUDA=", "VENV=.venv"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"demo/tuned.ckpt", ".venv/.stamps/torch"} and not (tmp_path / "build").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make on the PATH")
@pytest.mark.parametrize(("other", "refusal"), [
    ("", "cannot make environments"),  # what comes next: there is a file in their place
    ("sys.version_info = (3, 10, 14)", "is older than Python 3.11"),
    ("sys.maxsize = 2**31 - 1", "it needs 64-bit Linux with glibc 2.28 or newer"),
    ("platform.libc_ver = lambda: ('', '')", "it needs 64-bit Linux with glibc 2.28 or newer"),  # Alpine
    ("platform.libc_ver = lambda: ('glibc', '2.17')", "it needs 64-bit Linux with glibc 2.28 or newer"),
    ("sys.platform, platform.libc_ver = 'darwin', lambda: ('', '')", "cannot make environments"),  # untried, not refused
])  # fmt: skip
def test_a_system_that_torch_has_no_build_for_is_told_so_before_anything_is_installed(
    tmp_path: Path, other: str, refusal: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import platform, sys\n{other}\n")
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "venv"
    command = ["make", "--silent", "CUDA=", f"PYTHON={sys.executable}", f"VENV={folder}", f"{folder}/bin/python"]
    said = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    errors = [line for line in said.stderr.splitlines() if line.startswith("error: ")]
    assert said.returncode != 0 and len(errors) == 1 and errors[0].endswith(refusal) and "\nhint: " in said.stderr


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
