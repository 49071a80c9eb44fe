"""Every TensorRT name that the sources use exists in the published bindings and takes what they give it, and their own
checks accept our plugins.

Nothing is built: that needs the library and a GPU, and is in test_tensorrt.py.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from posecrafter_rt.engines.manifest import write_manifest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "posecrafter_rt" / "engines").glob("tensorrt*.py"))
_spec = spec_from_file_location("tensorrt_bindings_helper", Path(__file__).with_name("tensorrt_bindings.py"))
assert _spec is not None and _spec.loader is not None
helper = module_from_spec(_spec)
_spec.loader.exec_module(helper)

needs_bindings = pytest.mark.skipif(helper.missing_reason() is not None, reason=str(helper.missing_reason()))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helper.write_libraries(tmp_path_factory.mktemp("libraries"))


def uses_in(tree: ast.AST) -> Iterator[tuple[ast.Attribute, str, bool]]:
    """`trt.…` and `trtp.…` chains, and what is read off variables annotated with a `trt` class: node, chain, whether that."""
    classes: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign):
            classes[ast.unparse(node.target)] = ast.unparse(node.annotation)
        elif isinstance(node, ast.arg) and node.annotation is not None:
            classes[node.arg] = ast.unparse(node.annotation)
    classes = {name: annotation for name, annotation in classes.items() if re.fullmatch(r"trt\.\w+", annotation)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner, chain = ast.unparse(node.value), ast.unparse(node)
            if re.fullmatch(r"trtp?(\.\w+)+", chain):
                yield node, chain, False
            elif owner in classes:
                yield node, f"{classes[owner]}.{node.attr}", True


def names_in(source: str) -> set[str]:
    return {chain for _, chain, _ in uses_in(ast.parse(source))}


def calls_in(source: str) -> list[tuple[str, int, list[str]]]:
    """Of each call of such a name: the name, how many positional arguments with `self`, and the keywords."""
    tree = ast.parse(source)
    uses = {use: (chain, int(is_bound)) for use, chain, is_bound in uses_in(tree)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.func in uses:
            chain, count = uses[node.func]
            found.append((chain, count + len(node.args), [str(given.arg) for given in node.keywords]))
    return found


def all_names() -> set[str]:
    return set().union(*(names_in(path.read_text(encoding="utf-8")) for path in SOURCES))


def test_names_are_found_in_chains_and_on_annotated_variables() -> None:
    source = "def f(config: trt.IBuilderConfig):\n    self.c: trt.Runtime = trt.Runtime()\n"
    source += "    config.set_flag(trt.BuilderFlag.REFIT)\n    self.c.load()\n    trtp.cdiv(1, 2)\n    other.thing()\n"
    assert names_in(source) == {
        "trt.IBuilderConfig", "trt.IBuilderConfig.set_flag", "trt.Runtime", "trt.Runtime.load", "trt.BuilderFlag",
        "trt.BuilderFlag.REFIT", "trtp.cdiv"}  # fmt: skip


def test_calls_are_found_with_what_they_give() -> None:
    source = "def f(config: trt.IBuilderConfig):\n    config.set_flag(trt.BuilderFlag.REFIT, on=1)\n"
    source += "    other.thing(1)\n    config.flags\n    trt.ILogger.__init__(self)\n    trtp.register(a)(b)\n"
    assert calls_in(source) == [("trt.IBuilderConfig.set_flag", 2, ["on"]), ("trt.ILogger.__init__", 1, []),
                                ("trtp.register", 1, [])]  # fmt: skip


def test_the_sources_use_what_this_looks_for() -> None:
    assert {"trt.IExecutionContext.execute_async_v3", "trt.IExecutionContext.set_device_memory",
            "trt.IBuilderConfig.set_timing_cache", "trt.IBuilderConfig.progress_monitor", "trt.ITimingCache.serialize",
            "trt.ICudaEngine.get_tensor_dtype", "trt.IExecutionContext.update_device_memory_size_for_shapes",
            "trt.IExecutionContext.set_tensor_address", "trt.Refitter.set_named_weights", "trtp.aot_impl",
            "trt.BuilderFlag.REFIT"} <= all_names()  # fmt: skip


MISSING = """
import json, tensorrt as trt, tensorrt_bindings.plugin as trtp
def is_missing(chain):
    value = {"trt": trt, "trtp": trtp}[chain.split(".")[0]]
    for name in chain.split(".")[1:]:
        if not hasattr(value, name):
            return True
        value = getattr(value, name)
    return False
print(json.dumps([chain for chain in json.loads(NAMES) if is_missing(chain)]))
"""


@needs_bindings
def test_every_name_exists(libraries: Path) -> None:
    names = sorted(all_names())
    missing = helper.run(f"NAMES = {json.dumps(names)!r}\n{MISSING}", libraries)
    assert json.loads(missing.splitlines()[-1]) == []


@needs_bindings
def test_a_removed_name_is_noticed(libraries: Path) -> None:
    names = ["trt.BuilderFlag.FP16", "trt.IExecutionContext.execute_async_v2", "trt.BuilderFlag.REFIT"]
    missing = helper.run(f"NAMES = {json.dumps(names)!r}\n{MISSING}", libraries)
    assert json.loads(missing.splitlines()[-1]) == names[:2]


# pybind11 tells signatures in docstrings alone, one a line: `name(self: type, argument: type = default) -> type`.
UNTAKEN = r"""
import inspect, json, re, tensorrt as trt, tensorrt_bindings.plugin as trtp
def signature(text):
    while text != (text := re.sub(r"\[[^][]*\]|\([^()]*\)|<[^<>]*>", "", text)):
        pass  # what is in brackets has commas, too
    return inspect.Signature([
        inspect.Parameter(re.match(r"\w+", one)[0], inspect.Parameter.POSITIONAL_OR_KEYWORD,
                          default=None if "=" in one else inspect.Parameter.empty)
        for one in text.split(", ")
    ])
def signatures(function):
    try:
        return [inspect.signature(function)]
    except ValueError:
        return [signature(text) for text in re.findall(r"^(?:\d+\. )?\w+\((.*)\) -> ", function.__doc__, re.M)]
def is_taken(chain, count, keywords):
    value = {"trt": trt, "trtp": trtp}[chain.split(".")[0]]
    for name in chain.split(".")[1:]:
        value = getattr(value, name)
    is_class = inspect.isclass(value)
    for signature in signatures(value.__init__ if is_class else value):
        try:
            signature.bind(*[None] * (count + is_class), **dict.fromkeys(keywords))
        except TypeError:
            continue
        return True
    return False
print(json.dumps([call for call in json.loads(CALLS) if not is_taken(*call)]))
"""


@needs_bindings
def test_every_call_gives_what_its_name_takes(libraries: Path) -> None:
    calls = [call for path in SOURCES for call in calls_in(path.read_text(encoding="utf-8"))]
    assert len(calls) > 30
    untaken = helper.run(f"CALLS = {json.dumps(calls)!r}\n{UNTAKEN}", libraries)
    assert json.loads(untaken.splitlines()[-1]) == []


@needs_bindings
def test_wrong_arguments_are_noticed(libraries: Path) -> None:
    right = [("trt.Weights", 3, []), ("trt.Weights", 1, []),
             ("trt.IExecutionContext.execute_async_v3", 1, ["stream_handle"])]  # fmt: skip
    wrong = [("trt.Weights", 4, []), ("trt.IExecutionContext.execute_async_v3", 1, []),
             ("trt.IExecutionContext.execute_async_v3", 2, ["stream_handle"]), ("trt.IBuilderConfig.set_flag", 3, []),
             ("trt.ITimingCache.serialize", 1, ["deep"]), ("trtp.register", 0, []), ("trt.Runtime", 0, [])]  # fmt: skip
    untaken = helper.run(f"CALLS = {json.dumps(right + wrong)!r}\n{UNTAKEN}", libraries)
    assert [tuple(call) for call in json.loads(untaken.splitlines()[-1])] == wrong


WATCHED = """
import json
from queue import SimpleQueue
import tensorrt as trt
from posecrafter_rt.engines.tensorrt_build import make_monitor
from posecrafter_rt.engines.tensorrt_common import (
    failure, make_logger, note_error, take_errors, torch_dtype, trt_dtype,
)
phases = SimpleQueue()
monitor = make_monitor(phases)
assert {"phase_start", "step_complete", "phase_finish"} <= set(vars(trt.IProgressMonitor))
for name, parent in (("outer", None), ("inner", "outer"), ("innermost", "inner"), ("inner", "outer")):
    monitor.phase_start(name, parent, 2)
    assert monitor.step_complete(name, 0) is True
    monitor.phase_finish(name)
monitor.cancel()
cancelled = not monitor.step_complete("outer", 1)
told = [phases.get() for _ in range(phases.qsize())]
logger = make_logger()
assert logger is make_logger() and isinstance(logger, trt.ILogger)
logger.log(trt.ILogger.Severity.ERROR, "Error Code 2: OutOfMemory (Requested size was 7 bytes.)")
logger.log(trt.ILogger.Severity.WARNING, "a warning")
logger.log(trt.ILogger.Severity.VERBOSE, "a detail")
errors = [failure("it failed") for _ in range(2)]
note_error("posecrafter::TemporalAttention: too large\\nby far")
for _ in range(9):
    logger.log(trt.ILogger.Severity.ERROR, "Error Code 4: Internal Error (a plugin failed)")
errors += [failure("it failed") for _ in range(2)]
note_error("posecrafter::TemporalAttention: too large")
logger.log(trt.ILogger.Severity.ERROR, "Error Code 1: Cuda Runtime (out of memory)")
errors.append(failure("it failed"))
note_error("posecrafter::TemporalAttention: CUDA out of memory")
errors.append(failure("it failed"))
note_error("of what was tried and not taken")
take_errors()
errors.append(failure("it failed"))
types = [trt.float32, trt.float16, trt.bfloat16, trt.int64, trt.bool]
assert [trt_dtype(torch_dtype(dtype)) for dtype in types] == types
print(json.dumps([told, cancelled, [[type(error).__name__, str(error)] for error in errors]]))
"""


@needs_bindings
def test_the_monitor_and_the_logger_are_what_the_bindings_ask_for(libraries: Path) -> None:
    told, cancelled, errors = json.loads(helper.run(WATCHED, libraries).splitlines()[-1])
    assert told == ["outer", "inner"] and cancelled
    assert errors[0] == ["OutOfMemory", "it failed: Error Code 2: OutOfMemory (Requested size was 7 bytes.)"]
    assert errors[1] == ["PoseCrafterError", "it failed"]  # what was explained is not explained again
    note = "it failed: posecrafter::TemporalAttention: too large"  # whatever TensorRT has logged since
    assert errors[2:4] == [["PoseCrafterError", note], ["PoseCrafterError", "it failed"]]
    assert errors[4] == ["OutOfMemory", "it failed: Error Code 1: Cuda Runtime (out of memory)"]
    assert errors[5] == ["OutOfMemory", "it failed: posecrafter::TemporalAttention: CUDA out of memory"]
    assert errors[6:] == [["PoseCrafterError", "it failed"]]


# The library that stands in returns null pointers, as the real one does where the driver is too old for it.
NOT_STARTED = """
from pathlib import Path
import tensorrt as trt
from posecrafter_rt.engines.tensorrt import _deserialize
from posecrafter_rt.engines.tensorrt_build import build_plan
from posecrafter_rt.engines.tensorrt_common import make_logger, start
from posecrafter_rt.errors import PoseCrafterError
logger, severities = make_logger(), trt.ILogger.Severity

def log_and_build():
    logger.log(severities.WARNING, "CUDA initialization failure with error: 35")  # TensorRT 8.6 only warned
    logger.log(severities.INFO, "a detail")
    return trt.Builder(logger)

logger.log(severities.WARNING, "of something else")
for make in (lambda: build_plan(Path("unet.onnx"), {}, b"", False, print), lambda: _deserialize(Path(), "unet", ""),
             lambda: start(log_and_build), lambda: start(lambda: trt.Builder(7))):
    try:
        make()
    except PoseCrafterError as error:
        print(error, "|", error.hint)
    except TypeError as error:
        print("a wrong argument")
"""


@needs_bindings
def test_a_library_that_does_not_start_is_an_error_that_names_the_driver(libraries: Path) -> None:
    *failures, wrong = helper.run(NOT_STARTED, libraries).splitlines()
    reasons, hints = zip(*(line.split(" | ") for line in failures), strict=True)
    assert reasons == ("TensorRT does not start", "TensorRT does not start",
                       "TensorRT does not start: CUDA initialization failure with error: 35")  # fmt: skip
    assert all("NVIDIA driver" in hint for hint in hints) and wrong == "a wrong argument"


# A plan and its context are the library's: these stand in for those that refuse a shape outside the profile.
REFUSED = """
from pathlib import Path
from types import SimpleNamespace
from posecrafter_rt.engines.tensorrt_runtime import Slot
from posecrafter_rt.errors import ShapeError
from posecrafter_rt.spec import NetworkSpec, TensorSpec
context = SimpleNamespace(set_input_shape=lambda name, shape: False)
plan = SimpleNamespace(create_execution_context=lambda strategy: context)
spec = NetworkSpec("unet", (TensorSpec("latents", ("frames", 4)),), ())
try:
    Slot(spec, plan, {}, None, ((40, 4),), Path(NETWORKS))
except ShapeError as error:
    print(error.hint)
"""


@needs_bindings
def test_a_refused_shape_names_what_to_change_and_then_the_command(libraries: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path, {"backend": "tensorrt", "max_frames": 20})
    hint = helper.run(f"NETWORKS = {str(tmp_path / 'networks')!r}\n{REFUSED}", libraries).splitlines()[-1]
    command = f"posecrafter-rt build-engine tuned.ckpt -o {tmp_path} --backend tensorrt --max-frames 20 --force"
    assert hint == f"change --max-frames or --size and build it again: {command}"


# The registry and the expression builder are parts of the library: registration goes without the first, and sizes are
# worked out by a builder of constants.
REGISTERED = """
import json, operator
import tensorrt as trt
import tensorrt_bindings.plugin as trtp
sys.modules["tensorrt.plugin"] = trtp
trtp._lib._register_plugin_creator = lambda *arguments: None
from posecrafter_rt.engines.tensorrt_common import failure, make_logger
from posecrafter_rt.engines.tensorrt_plugins import register_plugins
register_plugins((8, 6))

class Constant(trt.IDimensionExpr):
    def is_constant(self):
        return True
    def get_constant_value(self):
        return self.value

def constant(value):
    expression = Constant.__new__(Constant)
    expression.value = value
    return expression

OPERATIONS = {
    trt.DimensionOperation.SUM: operator.add, trt.DimensionOperation.PROD: operator.mul,
    trt.DimensionOperation.FLOOR_DIV: operator.floordiv, trt.DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
}

class Builder:
    def constant(self, value):
        return constant(value)
    def operation(self, kind, first, second):
        return constant(OPERATIONS[kind](first.value, second.value))

trtp._tensor.SymIntExpr._exprBuilder = Builder()

def launch(name, q, k):
    definition = trtp._lib.QDP_REGISTRY[f"posecrafter::{name}"]
    inputs = [trtp.TensorDesc(trtp.ShapeExprs.from_tuple(shape), trt.float16) for shape in (q, k, k)]
    output = definition.register_func(*inputs, heads=2)  # numbers are known only when a kernel is asked for
    for desc, shape in zip(inputs, (q, k, k)):
        desc.shape = trtp.Shape(shape)
    kernel, ptx, params, extra = definition.aot_impl_func(*inputs, 2, (output,), 0)
    assert all(isinstance(value, trtp.SymInt32) for value in extra) and f".entry {kernel}(" in ptx
    sizes = ("grid_x", "grid_y", "grid_z", "block_x", "shared_mem")
    return {
        "output": [size._expr.value for size in output.shape_expr], "dtype": str(output.dtype),
        "attributes": definition.aot_impl_attr_names, "integers": [value._expr.value for value in extra],
        **{size: getattr(params, size)._expr.value for size in sizes},
    }

launches = [launch("KeyframeAttention", (6, 100, 80), (2, 77, 80)),
            launch("TemporalAttention", (2, 5, 33, 80), (2, 5, 33, 80))]
try:
    launch("TemporalAttention", (1, 70000, 4096, 80), (1, 70000, 4096, 80))
except ValueError:  # the library prints it to the terminal
    make_logger().log(trt.ILogger.Severity.ERROR, "Error Code 9: Internal Error (the build failed)")  # as it does then
    launches.append(str(failure("it failed")))
print(json.dumps(launches))
"""


@needs_bindings
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_registration_shapes_and_launches_pass_through_the_bindings_own_code(libraries: Path) -> None:
    keyframe, temporal, why = json.loads(helper.run(REGISTERED, libraries).splitlines()[-1])
    assert why.startswith("it failed: posecrafter::TemporalAttention: ") and "build for fewer frames" in why
    assert keyframe["output"] == [6, 100, 80] and temporal["output"] == [2, 5, 33, 80]
    assert keyframe["dtype"] == temporal["dtype"] == "DataType.HALF"
    assert keyframe["attributes"] == temporal["attributes"] == ["heads"]
    assert keyframe["integers"] == [300, 77, 80, 80, 80, 77 * 80, 77 * 80, 80]
    assert temporal["integers"] == [5, 5, 33, 5 * 33 * 80, 33 * 80, 80, 5 * 33 * 80, 33 * 80, 80, 80]
    assert (keyframe["grid_y"], keyframe["grid_z"], temporal["grid_z"]) == (2, 2, 2)
    assert keyframe["block_x"] % 32 == 0 and 0 < keyframe["shared_mem"] <= 48 << 10
