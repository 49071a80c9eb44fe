"""Operations for OpenVINO: 3×3 convolutions by Winograd's minimal filtering, linear maps and attention beside them.

Layer 4. They are C++ (operations/), compiled once a machine against the OpenVINO that is installed and kept in the
user's cache. Where that fails OpenVINO's own operations run: nothing but time is lost.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import subprocess
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from posecrafter_rt import config
from posecrafter_rt.atomic import atomic_path, sha256_file, sha256_json
from posecrafter_rt.engines.base import Precision
from posecrafter_rt.errors import PoseCrafterError, last_line
from posecrafter_rt.machine import cpu_features

if TYPE_CHECKING:
    import openvino

SOURCES = Path(__file__).with_name("operations")
FLAGS = ("-std=c++17", "-O3", "-g0", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
         "-ffp-contract=fast")  # fmt: skip
COMPILE_S = 300  # a compiler that takes longer hangs
# Of the largest value, where float32 comes to 1e-5, 16 bits to 1e-3 and eight to 0.01.
TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "fp16": 5e-3, "int8": 0.05}
WITH_WEIGHTS = ("FusedConvolution", "Linear")  # of our operations
REWRITING = 9  # counted up when networks are rewritten otherwise: they are kept under it

log = logging.getLogger(__name__)


class Vectors(NamedTuple):
    """What the operations are compiled for."""

    lanes: int  # floats: input channels come in so many, output channels in twice as many
    needed: frozenset[str]  # of the processor
    flags: tuple[str, ...]
    has_bytes: bool = False  # whether products in eight bits are among them
    has_halves: bool = False  # whether those in 16 bits are; otherwise weights in 16 bits are multiplied in float32


AVX2, AVX512 = frozenset({"avx2", "fma", "f16c"}), frozenset({"avx512f", "avx512_vnni"})
VECTORS = (
    Vectors(
        16,
        AVX512 | {"avx512_fp16", "avx512bw", "avx512dq", "avx512vl"},
        ("-mavx512fp16", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprfchw"),
        has_bytes=True,
        has_halves=True,
    ),
    Vectors(16, AVX512, ("-mavx512f", "-mavx512vnni", "-mprfchw"), has_bytes=True),
    Vectors(16, frozenset({"avx512f"}), ("-mavx512f",)),
    Vectors(8, AVX2 | {"avx_vnni"}, ("-mavx2", "-mfma", "-mf16c", "-mavxvnni", "-mprfchw"), has_bytes=True),
    Vectors(8, AVX2, ("-mavx2", "-mfma", "-mf16c")),
)  # the widest first


class Operations(NamedTuple):
    """The compiled operations: what they are compiled for, what makes nodes of them, and what those are to multiply in."""

    vectors: Vectors
    factory: Any
    precision: Precision

    @property
    def lanes(self) -> int:
        """Floats of a vector."""
        return self.vectors.lanes


class OperationsError(Exception):
    """Why the operations cannot be had here, in one line."""


class RefusedError(OperationsError):
    """Why a compiler does not make them for some vectors; it may for others."""


class Built(NamedTuple):
    """The compiled operations, or the reason why there are none."""

    vectors: Vectors | None = None
    library: Path | None = None
    reason: str | None = None


def missing_reason() -> str | None:
    """Why the operations cannot be had here, or None. Compiles them, which takes seconds, where that was not done yet."""
    return _built(_fitting()).reason


def missing_bytes_reason() -> str | None:
    """Why products in eight bits cannot be had here, or None."""
    if not any(vectors.has_bytes for vectors in _fitting()[:1]):
        return "this processor has no VNNI; use fp32"
    reason, vectors = _missing_for("int8"), _built(_fitting()).vectors
    is_left_out = reason is None and vectors is not None and not vectors.has_bytes
    return "int8 needs a compiler that knows VNNI: g++ 11 or newer" if is_left_out else reason


def missing_halves_reason() -> str | None:
    """Why weights in 16 bits cannot be had here, or None. As the others it compiles, which takes seconds, the first time."""
    return _missing_for("fp16")


def _missing_for(precision: Precision) -> str | None:
    reason = missing_reason()
    return None if reason is None else f"{precision} needs operations that cannot be had here: {reason}"


def extend(core: openvino.Core) -> str | None:
    """Make the operations known to a core, so that models with them can be compiled and read.

    Returns: what tells their build from every other, or None where there is none.
    """
    library = _built(_fitting()).library
    if library is None:
        return None
    core.add_extension(library)
    return library.stem


def operations(precision: Precision = "fp32") -> Operations | None:
    """The operations for this processor, or None where they cannot be had."""
    vectors, library, _ = _built(_fitting())
    return None if vectors is None or library is None else Operations(vectors, _factory(library), precision)


def hold_weights(model: openvino.Model, release: Callable[[], None]) -> None:
    """Let every operation of ours in a model that has weights hold them, packed, in place of the constants that they are made of.

    release: called after each; what holds those constants may then let go of them. The model cannot be saved afterwards.
    """
    available = operations()
    nodes = [node for node in model.get_ordered_ops() if node.get_type_name() in WITH_WEIGHTS]
    while available is not None and nodes:
        node = nodes.pop()  # the last that refers to its constants
        attributes = {**node.get_attributes(), "holds_weights": True}
        node.output(0).replace(
            available.factory.create(node.get_type_name(), node.input_values(), attributes).output(0)
        )
        del node
        release()


def _fitting() -> tuple[Vectors, ...]:
    """Those that this processor has, the widest first."""
    features = cpu_features()
    return tuple(vectors for vectors in VECTORS if vectors.needed <= features)


@cache  # for good: OpenVINO would unload the library with the last factory and core, and not ask for nodes that are left
def _factory(library: Path) -> Any:
    from openvino.utils.node_factory import NodeFactory

    factory = NodeFactory()
    factory.add_extension(str(library))
    return factory


@cache
def _built(fitting: tuple[Vectors, ...]) -> Built:
    """For the first of these vectors that the compiler here knows; why there are none is logged once."""
    reason = "they are written for AVX2, FMA and F16C, or AVX-512, which this processor lacks"
    for vectors in fitting:
        try:
            library = _compiled(vectors)
            _factory(library)
            return Built(vectors, library)
        except OperationsError as error:
            reason = str(error)
            if not isinstance(error, RefusedError):
                break
    log.info("convolutions, linear maps and attention are OpenVINO's own: %s", reason)
    return Built(reason=reason)


def _compiled(vectors: Vectors) -> Path:
    try:
        import openvino
    except ImportError as error:
        raise OperationsError("openvino is not installed") from error
    home = Path(openvino.__file__).parent
    if not (home / "include" / "openvino").is_dir():
        raise OperationsError("this OpenVINO came without its headers")
    sources = sorted(SOURCES.glob("*.*"))
    key = {"openvino": openvino.get_version(), "home": str(home), "flags": (*FLAGS, *vectors.flags),
           "sources": [path.read_text(encoding="utf-8") for path in sources]}  # fmt: skip
    folder, name = config.cache_dir() / "openvino_operations", sha256_json(key)
    kept = next(filter(_is_sound, folder.glob(f"{name}-*.so")), None)
    if kept is not None:
        return kept
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as building:
            built = Path(building) / "built.so"
            _compile([path for path in sources if path.suffix == ".cpp"], vectors, home, built)
            _try(built, vectors)
            library = folder / f"{name}-{sha256_file(built)}.so"
            with atomic_path(library) as temporary:
                shutil.copyfile(built, temporary)
    except (PoseCrafterError, OSError) as error:
        raise OperationsError(f"they cannot be kept: {error}") from error
    return library


def _is_sound(library: Path) -> bool:
    """Whether what was compiled earlier is as it was, which its name tells, and loads: the cache may be another system's.

    To load a damaged one would end the process.
    """
    try:
        reason = None if library.stem.endswith(sha256_file(library)) else "it was altered"
        if reason is None:
            _factory(library)
    except (OSError, RuntimeError) as error:
        reason = last_line(error)
    if reason is not None:
        log.warning("%s is compiled again: %s", library, reason)
    return reason is None


def _compile(sources: list[Path], vectors: Vectors, home: Path, library: Path) -> None:
    compiler = config.compiler() or next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), "")
    if not compiler:
        raise OperationsError("no C++ compiler was found: install g++, or name one in CXX")
    linked = [next(home.glob(f"libs/{name}.so*"), None) for name in ("libopenvino", "libtbb")]
    if None in linked:
        raise OperationsError("this OpenVINO came without its libraries, or without TBB")
    command = [*shlex.split(compiler), *FLAGS, *vectors.flags, "-I", str(home / "include"), *map(str, sources), "-o", str(library),
               *map(str, linked), f"-Wl,-rpath,{home / 'libs'}"]  # fmt: skip
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise OperationsError(f"{compiler} cannot be run: {error}") from error
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise RefusedError(f"{compiler} refuses them: {next((line for line in lines if 'error' in line), lines[-1])}")


def _try(library: Path, vectors: Vectors) -> None:
    """Raise OperationsError unless what it does with a small picture is what OpenVINO does."""
    import openvino
    from openvino import opset13 as op

    shape = [2, vectors.lanes, 9, 13]
    parameter, factory = op.parameter(shape, np.float32), _factory(library)
    trials = [trial for make in (_convolutions, _linear_maps, _attentions) for trial in make(factory, parameter)]
    trials = [trial for trial in trials if trial.suits(vectors)]
    try:
        core = openvino.Core()
        core.add_extension(library)
        model = openvino.Model([node for trial in trials for node in (trial.own(), trial.ours())], [parameter])
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        outputs = list(compiled([np.random.default_rng(0).normal(size=shape).astype(np.float32)]).values())
    except RuntimeError as error:
        raise OperationsError(f"OpenVINO refuses them: {last_line(error)}") from error
    for trial, own, tried in zip(trials, outputs[::2], outputs[1::2], strict=True):
        with np.errstate(all="ignore"):  # what is not written may hold any bits
            is_near = np.abs(own - tried).max() <= TOLERANCES[trial.precision] * np.abs(own).max()
        if not is_near:
            raise OperationsError("compiled here they do not give what OpenVINO's own operations do")


class Trial(NamedTuple):
    """What makes the same output by OpenVINO's operations and by one of ours."""

    own: Callable[[], Any]
    ours: Callable[[], Any]
    precision: Precision = "fp32"
    is_narrow: bool = False  # products are in that precision, too

    def suits(self, vectors: Vectors) -> bool:
        """Whether the operations have it that are compiled for these vectors."""
        has = {"int8": vectors.has_bytes, "fp16": vectors.has_halves}
        return not self.is_narrow or has[self.precision]


def _constant(*shape: int) -> Any:
    from openvino import opset13 as op

    return op.constant(np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32))


def _convolutions(factory: Any, pixels: Any) -> list[Trial]:
    """A convolution in tiles of either size, of a doubled picture, after GroupNorm and SiLU, and added to something."""
    from openvino import opset13 as op

    frames, lanes, height, width = pixels.get_output_shape(0)
    weight, bias = _constant(2 * lanes, lanes, 3, 3), _constant(2 * lanes)
    scale, shift = _constant(lanes), _constant(lanes)

    def by_channel(values: Any) -> Any:
        return op.unsqueeze(values, np.array([1, 2]))

    def own(of: Any, stride: int = 1) -> Any:
        return op.add(op.convolution(of, weight, [stride] * 2, [1, 1], [1, 1], [1, 1]), by_channel(bias))

    def ours(*more: Any, **attributes: Any) -> Any:
        return factory.create(
            "FusedConvolution", [node.output(0) for node in (pixels, weight, bias, *more)], attributes
        )

    rows, columns = (np.repeat(np.arange(side), 2) for side in (height, width))
    doubled = op.gather(op.gather(pixels, rows, np.int64(2)), columns, np.int64(3))
    grouped = op.reshape(pixels, np.array([frames, 4, -1]), special_zero=False)
    normed = op.mvn(grouped, np.array([2]), True, 1e-5, "INSIDE_SQRT")
    normed = op.reshape(normed, np.array([frames, lanes, height, width]), special_zero=False)
    normed = op.add(op.multiply(normed, by_channel(scale)), by_channel(shift))
    active, residual = op.multiply(normed, op.sigmoid(normed)), op.concat([pixels, pixels], 1)
    norm = partial(ours, scale, shift, groups=4, eps=1e-5)
    return [Trial(partial(own, pixels), ours), Trial(partial(own, pixels), partial(ours, tile=2)),
            Trial(partial(own, doubled), partial(ours, times=2)), Trial(partial(own, active), norm),
            Trial(lambda: op.add(own(pixels), residual), partial(ours, residual)),
            Trial(partial(own, active), partial(norm, tile=2, in_halves=True), "fp16"),
            *(Trial(wanted, partial(found, tile=0, in_halves=precision == "fp16"), precision, is_narrow=True)
              for precision in ("fp16", "int8")
              for wanted, found in ((partial(own, pixels, 2), partial(ours, stride=2)),
                                    (partial(own, doubled), partial(ours, times=2)),
                                    (lambda: op.add(own(active), residual), partial(norm, residual))))]  # fmt: skip


def _linear_maps(factory: Any, pixels: Any) -> list[Trial]:
    """A map of pixels to pixels, a gated one of tokens, and another after that; the first and the last added to something."""
    from openvino import opset13 as op

    frames, lanes, height, width = pixels.get_output_shape(0)
    weight, bias, residual = _constant(8 * lanes, lanes), _constant(8 * lanes), op.concat([pixels] * 8, 1)
    flat = op.reshape(pixels, np.array([frames, lanes, height * width]), special_zero=False)
    tokens = op.transpose(flat, np.array([0, 2, 1]))
    mapped = op.add(op.matmul(tokens, weight, False, True), bias)
    shape = np.array([frames, 8 * lanes, height, width])
    planes = op.reshape(op.transpose(mapped, np.array([0, 2, 1])), shape, special_zero=False)
    value, gate = op.split(mapped, np.array(2), 2).outputs()
    gated = op.multiply(value, op.gelu(gate, "erf"))
    back, shift, added = _constant(6 * lanes, 4 * lanes), _constant(6 * lanes), op.concat([tokens] * 6, 2)
    fed = op.add(op.add(op.matmul(gated, back, False, True), shift), added)

    def ours(*inputs: Any, **attributes: Any) -> Any:
        return factory.create("Linear", [node.output(0) for node in inputs], attributes)

    to_planes = partial(ours, pixels, weight, bias, residual, height=height)
    feed = partial(ours, tokens, weight, bias, back, shift, added, is_gated=True)
    owns = [lambda: op.add(planes, residual), lambda: gated, lambda: fed]
    return [Trial(owns[0], to_planes), Trial(owns[1], partial(ours, tokens, weight, bias, is_gated=True)),
            Trial(owns[2], feed), Trial(owns[2], partial(feed, in_halves=True), "fp16"),
            Trial(owns[0], partial(to_planes, in_bytes=True), "int8", is_narrow=True),
            Trial(owns[2], partial(feed, in_bytes=True), "int8", is_narrow=True)]  # fmt: skip


def _attentions(factory: Any, pixels: Any) -> list[Trial]:
    """Of a picture's tokens to one another, and to the same ones of other frames, of all and of one; keys beside values."""
    from openvino import opset13 as op

    frames, lanes, height, width = pixels.get_output_shape(0)
    flat = op.reshape(pixels, np.array([frames, lanes, height * width]), special_zero=False)
    query = op.transpose(flat, np.array([0, 2, 1]))
    key, value = op.multiply(query, op.constant(np.float32(-0.5))), op.sin(query)
    both = op.concat([key, value], 2)

    def heads(tokens: Any, order: list[int]) -> Any:
        batch, rows, channels = tokens.get_output_shape(0)
        return op.transpose(
            op.reshape(tokens, np.array([batch, rows, 2, channels // 2]), special_zero=False), np.array(order)
        )

    def attend(query: Any, key: Any, value: Any) -> Any:
        scores = op.matmul(heads(query, [0, 2, 1, 3]), heads(key, [0, 2, 3, 1]), False, False)
        weights = op.softmax(op.divide(scores, op.constant(np.float32((lanes // 2) ** 0.5))), 3)
        means = op.transpose(op.matmul(weights, heads(value, [0, 2, 1, 3]), False, False), np.array([0, 2, 1, 3]))
        return op.reshape(means, np.array(query.get_output_shape(0)), special_zero=False)

    def over_frames() -> Any:
        turned = (op.transpose(tokens, np.array([1, 0, 2])) for tokens in (query, key, value))
        return op.unsqueeze(op.transpose(attend(*turned), np.array([1, 0, 2])), np.array(0))

    def first_frame() -> Any:
        first = op.gather(value, np.zeros(frames, np.int64), np.int64(0))
        return op.unsqueeze(first, np.array(0))

    def ours(*inputs: Any, is_over_frames: bool = False, **attributes: Any) -> Any:
        given = [op.unsqueeze(node, np.array(0)) if is_over_frames else node for node in inputs[:3]]
        attributes |= {"heads": 2, "width": lanes // 2, "value_at": lanes}
        return factory.create("Attention", [node.output(0) for node in (*given, *inputs[3:])], attributes)

    tokens, own, mask = (
        (query, both, both),
        partial(attend, query, key, value),
        op.constant(np.arange(frames)[None] == 0),
    )
    return [Trial(own, partial(ours, *tokens)), Trial(own, partial(ours, *tokens, in_bytes=True), "int8", is_narrow=True),
            Trial(over_frames, partial(ours, *tokens, is_over_frames=True)),
            Trial(first_frame, partial(ours, *tokens, mask, is_over_frames=True))]  # fmt: skip
