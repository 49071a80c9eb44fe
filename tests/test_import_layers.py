"""Who may import whom: arrows point down only, and no circle anywhere (function-local imports count too).

Tests; reads the sources, imports nothing.
"""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"posecrafter_rt": ROOT / "posecrafter_rt"} | {
    f"posecrafter_rt.{name}": ROOT / name for name in ("kernels", "export")
}

# A unit is a file or folder directly below the package.
LAYERS = {
    0: (
        "errors",
        "config",
        "spec",
        "locks",
        "atomic",
        "blob_cache",
        "machine",
        "plain_numbers",
        "mapped_file",
        "tensor_file",
    ),
    1: ("poses", "method", "framing", "video_decoding", "video_io"),
    2: ("ops", "kernels", "_native"),
    3: ("models", "checkpoint"),
    4: ("engines", "export", "tuning", "tuning_losses", "tuning_run", "embedded"),
    5: ("runtime",),
    6: ("avatar", "avatar_networks", "avatar_once", "avatar_render", "building", "engine_training", "passed_over"),
    7: ("serve", "evaluate", "rendering", "demo"),
    8: ("cli", "__main__"),
}
LAYER_OF = {unit: layer for layer, units in LAYERS.items() for unit in units}

# Between units of one layer, or upwards, only these; each with its reason.
ALLOWED = {
    ("atomic", "errors"): "a full disk is an error of ours",
    ("method", "poses"): "Eq. 5 and the edits are about keypoints",
    ("framing", "poses"): "keypoints move with the frames they lie on",
    ("video_io", "video_decoding"): "what FFmpeg reads",
    ("video_decoding", "framing"): "sizes in messages",
    ("video_io", "framing"): "frames are fitted as they are read",
    ("poses", "video_io"): "keypoints are detected in a video",
    ("ops", "kernels"): "the fast paths of the operators",
    ("ops", "_native"): "the fast paths of the operators",
    ("checkpoint", "models"): "a checkpoint names the base that it was tuned on",
    ("tuning", "tuning_losses"): "what tuning minimises",
    ("tuning", "tuning_run"): "where a run of it is",
    ("tuning_run", "tuning_losses"): "what the small decoder is taught by is made once a run",
    ("engines", "export"): "an engine is built from an exported network; never back",
    ("demo", "evaluate"): "the demo measures what it rendered",
    ("demo", "rendering"): "the demo is the whole path",
    ("avatar", "avatar_networks"): "the networks that it has loaded",
    ("avatar", "avatar_once"): "what it computes once",
    ("avatar_once", "avatar_networks"): "it computes with them",
    ("avatar", "avatar_render"): "the render loop",
    ("avatar_render", "avatar_networks"): "it renders with them",
    ("avatar", "engine_training"): "what it was tuned on",
    ("building", "engine_training"): "what the checkpoint was tuned on",
    ("building", "passed_over"): "what failed before",
    ("__main__", "cli"): "the same command",
}
# The only circle: a class whose convenience methods call the file that is written in terms of the class.
DEFERRED = {("posecrafter_rt.poses.keypoints", "posecrafter_rt.poses.openpose_json")}  # PoseSequence.load and save
# The runtime knows no backend: of engines it sees the protocol alone.
RUNTIME_SEES = {"posecrafter_rt.engines.base"}


def find_modules() -> dict[str, Path]:
    """Every module of the package by its full name."""
    modules = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            modules[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return modules


MODULES = find_modules()


def unit_of(module: str) -> str:
    """`posecrafter_rt.poses.draw` → `poses`; the package itself → empty."""
    return module.split(".")[1] if "." in module else ""


def imports_of(module: str) -> dict[str, int]:
    """Modules of the package that a module imports anywhere but for type checking, each with the line of one import."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found: dict[str, int] = {}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name: node.lineno for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import; write the full name"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name != "posecrafter_rt.__version__":  # the one name that is defined there
                    found[name if name in MODULES else str(node.module)] = node.lineno
    return {name: line for name, line in found.items() if name.split(".")[0] == "posecrafter_rt"}


def verdict(module: str, imported: str) -> str | None:
    """Why an import is forbidden, or None."""
    source, target = unit_of(module), unit_of(imported)
    if source in ("", target):
        return None  # the package itself imports nothing (test_lean_import), siblings may
    if target == "":
        return "take the name from where it is defined"
    if not {source, target} <= set(LAYER_OF):
        return f"{source} or {target} is in no layer; put it into LAYERS"
    if source == "runtime" and target == "engines" and imported not in RUNTIME_SEES:
        return "the runtime knows no backend"
    if LAYER_OF[target] < LAYER_OF[source] or LAYER_OF[target] == 0 or (source, target) in ALLOWED:
        return None
    return f"{source} is layer {LAYER_OF[source]}, {target} layer {LAYER_OF[target]}"


def test_every_module_has_a_layer() -> None:
    units = {unit_of(module) for module in MODULES} - {""}
    assert units <= set(LAYER_OF), f"in no layer: {sorted(units - set(LAYER_OF))}"


def test_imports_point_down() -> None:
    wrong = [
        f"{MODULES[module].relative_to(ROOT)}:{line}: imports {imported}: {reason}"
        for module in sorted(MODULES)
        for imported, line in imports_of(module).items()
        if (reason := verdict(module, imported)) is not None
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circle() -> None:
    graph = {
        module: {name for name in imports_of(module) if name != module and (module, name) not in DEFERRED}
        for module in MODULES
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' ← '.join(error.args[1])}")


def test_bare_names_of_mapped_folders_are_not_imported() -> None:
    """`kernels` and `export` are other people's packages on the index."""
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            bare = [name for name in names if name.split(".")[0] in ("kernels", "export")]
            assert not bare, f"{module}:{node.lineno}: {bare[0]}"  # type: ignore[attr-defined]


def test_only_config_reads_the_environment() -> None:
    readers = {
        str(path.relative_to(ROOT))
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and ast.unparse(node.value) == "os"
    }
    assert readers <= {"posecrafter_rt/config.py"}, readers


@pytest.mark.parametrize(
    ("module", "imported", "is_allowed"),
    [
        ("posecrafter_rt.engines.openvino", "posecrafter_rt.export.onnx", True),
        ("posecrafter_rt.export.onnx", "posecrafter_rt.engines.base", False),
        ("posecrafter_rt.models.unet", "posecrafter_rt.errors", True),
        ("posecrafter_rt.models.unet", "posecrafter_rt.engines.base", False),
        ("posecrafter_rt.method.ddim", "posecrafter_rt.ops.reference", False),
        ("posecrafter_rt.runtime.render", "posecrafter_rt.engines.base", True),
        ("posecrafter_rt.runtime.render", "posecrafter_rt.engines.torch", False),
        ("posecrafter_rt.poses.draw", "posecrafter_rt.poses.keypoints", True),
    ],
)
def test_the_rules_themselves(module: str, imported: str, is_allowed: bool) -> None:
    assert (verdict(module, imported) is None) == is_allowed
