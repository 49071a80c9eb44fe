"""3×3 convolutions as OpenVINO does not have them: by Winograd's minimal filtering, a quarter of the products or four ninths,
and with the GroupNorm and SiLU before them.

Layer 4. The operation is C++ (winograd/), compiled once a machine against the OpenVINO that is installed and kept in the
user's cache. Where that fails OpenVINO's own convolutions run: nothing but time is lost.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from posecrafter_rt import config
from posecrafter_rt.atomic import atomic_path, sha256_file, sha256_json
from posecrafter_rt.engines.openvino_norms import GroupNorm, group_norm
from posecrafter_rt.engines.openvino_patterns import added, has_filter, is_same, of_channels, orders, with_bias
from posecrafter_rt.errors import PoseCrafterError, last_line
from posecrafter_rt.machine import cpu_features
from posecrafter_rt.models.doubling import fold_doubling

if TYPE_CHECKING:
    import openvino

SOURCES = Path(__file__).with_name("winograd")
FLAGS = ("-std=c++17", "-O3", "-g0", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
         "-ffp-contract=fast")  # fmt: skip
COMPILE_S = 300  # a compiler that takes longer hangs
# In tiles of 4×4 outputs products are a quarter of a direct convolution's, and weights four times as large; in those of 2×2
# four ninths, and less than twice as large. So large pictures and small weights have the former.
LEAST_TILES = 16  # over all frames: fewer do not pay for the transformed weights
LARGE_TILES = 16  # of 4×4, in one frame
MOST_BYTES = 1 << 26  # of a layer's weights transformed for 4×4, in smaller pictures
TOLERANCE = 1e-4  # of the largest value, where float32 comes to 1e-5
REWRITING = 3  # counted up when networks are rewritten otherwise, here or in openvino_linear: they are kept under it

log = logging.getLogger(__name__)


class Vectors(NamedTuple):
    """What the operation is compiled for."""

    lanes: int  # floats: input channels come in so many, output channels in twice as many
    needed: frozenset[str]  # of the processor
    flags: tuple[str, ...]


VECTORS = (
    Vectors(16, frozenset({"avx512f"}), ("-mavx512f",)),
    Vectors(8, frozenset({"avx2", "fma"}), ("-mavx2", "-mfma")),
)  # the widest first


class WinogradError(Exception):
    """Why the operation cannot be had here, in one line."""


def missing_reason() -> str | None:
    """Why the operation cannot be had here, or None. Compiles it, which takes seconds, where that was not done yet."""
    return _library(_vectors())[1]


def extend(core: openvino.Core) -> str | None:
    """Make the operation known to a core, so that models with it can be compiled and read.

    Returns: what tells its build from every other, or None where there is none.
    """
    library, _ = _library(_vectors())
    if library is None:
        return None
    core.add_extension(library)
    return library.stem


def use_winograd(model: openvino.Model) -> int:
    """Replace the convolutions of a float32 model of fixed shapes that gain by it, in place; returns how many."""
    vectors = _vectors()
    library, _ = _library(vectors)
    if vectors is None or library is None:
        return 0
    factory, ops = _factory(library), model.get_ordered_ops()
    gaining = [(node, tile) for node in ops if (tile := _tile(node, vectors.lanes))]
    for convolution, tile in gaining:
        _rewrite(convolution, tile, factory)
    return len(gaining)


def _tile(node: Any, lanes: int) -> int | None:
    """The side of the tiles that a convolution gains most by; None: of none, or it is no such convolution."""
    if node.get_type_name() not in ("Convolution", "ConvolutionBackpropData"):
        return None
    frames, channels, height, width = node.get_output_shape(0)
    in_channels, tiles = node.get_input_shape(0)[1], {side: -(-height // side) * -(-width // side) for side in (2, 4)}
    side = 4 if tiles[4] >= LARGE_TILES or 4 * 36 * channels * in_channels <= MOST_BYTES else 2
    gains = (
        node.input_value(1).get_node().get_type_name() == "Constant"  # it is transformed once
        and all(value.get_element_type().get_type_name() == "f32" for value in node.input_values())
        and in_channels % lanes == channels % (2 * lanes) == 0
        and frames * tiles[side] >= LEAST_TILES
        and (_is_convolution(node) or _is_doubling(node))
    )
    return side if gains else None


def _is_convolution(node: Any) -> bool:
    """Whether it is one of 3×3, stride 1 and padding 1."""
    return node.get_type_name() == "Convolution" and has_filter(node, kernel=3, stride=1, padding=1)


def _is_doubling(node: Any) -> bool:
    """Whether it is a transposed one that stands for a doubled picture's convolution, see `models.folding.fold_doubled`."""
    if node.get_type_name() != "ConvolutionBackpropData" or not has_filter(node, kernel=4, stride=2, padding=1):
        return False
    if len(node.input_values()) != 2 or any(node.get_attributes()["output_padding"]):
        return False
    weight = np.asarray(node.input_value(1).get_node().data)
    again = fold_doubling(torch.from_numpy(_unfolded(weight))).numpy()
    return bool(np.abs(again - weight).max() <= TOLERANCE * np.abs(weight).max())


def _unfolded(weight: np.ndarray) -> np.ndarray:
    """The weight (out, in, 3, 3) of which `fold_doubling` made this (in, out, 4, 4).

    Of four taps the first is w2, the second w1 + w2, the last w0.
    """
    rows = np.stack([weight[:, :, 3], weight[:, :, 1] - weight[:, :, 0], weight[:, :, 0]], 2)
    both = np.stack([rows[..., 3], rows[..., 1] - rows[..., 0], rows[..., 0]], 3)
    return np.ascontiguousarray(both.transpose(1, 0, 2, 3))


def _rewrite(convolution: Any, tile: int, factory: Any) -> None:
    """Replace a convolution, the bias after it, and the GroupNorm and SiLU before it, as far as they are there."""
    from openvino import opset13 as op

    weight, channels = convolution.input_value(1), convolution.get_output_shape(0)[1]
    attributes: dict[str, Any] = {"tile": tile}
    if convolution.get_type_name() == "ConvolutionBackpropData":
        weight = op.constant(_unfolded(np.asarray(weight.get_node().data))).output(0)
        attributes["times"] = 2
    replaced, bias = with_bias(convolution, channels)
    constants = [np.zeros(channels, np.float32) if bias is None else bias]
    pixels = convolution.input_value(0)
    before = _silu_of_norm(pixels)
    if before is not None:
        norm, norm_weight, norm_bias = before
        pixels, attributes = norm.pixels, {**attributes, "groups": norm.groups, "eps": norm.eps}
        constants += [norm_weight, norm_bias]
    inputs = [pixels, weight, *(op.constant(values).output(0) for values in constants)]
    replaced.output(0).replace(factory.create("Winograd", inputs, attributes).output(0))


def _silu_of_norm(value: Any) -> tuple[GroupNorm, np.ndarray, np.ndarray] | None:
    """The GroupNorm, its weight and its bias, that SiLU(GroupNorm(…)) is of."""
    for normed, gate in orders(value.get_node(), "Multiply"):
        if gate.get_node().get_type_name() != "Sigmoid" or not is_same(gate.get_node().input_value(0), normed):
            continue
        channels = normed.get_shape()[1]
        bias = added(normed.get_node(), channels)
        for scaled, _ in orders(normed.get_node(), "Add"):
            for grouped, factor in orders(scaled.get_node(), "Multiply"):
                norm, weight = group_norm(grouped.get_node()), of_channels(factor, channels)
                if norm is not None and weight is not None and bias is not None:
                    return norm, weight, bias
    return None


def _vectors() -> Vectors | None:
    """The widest that this processor has."""
    features = cpu_features()
    return next((vectors for vectors in VECTORS if vectors.needed <= features), None)


@cache  # for good: OpenVINO would unload the library with the last factory and core, and not ask for nodes that are left
def _factory(library: Path) -> Any:
    from openvino.utils.node_factory import NodeFactory

    factory = NodeFactory()
    factory.add_extension(str(library))
    return factory


@cache
def _library(vectors: Vectors | None) -> tuple[Path | None, str | None]:
    """The compiled operation, or why there is none, which is logged once."""
    try:
        library = _compiled(vectors)
        _factory(library)
        return library, None
    except WinogradError as error:
        log.info("3×3 convolutions are OpenVINO's own: %s", error)
        return None, str(error)


def _compiled(vectors: Vectors | None) -> Path:
    if vectors is None:
        raise WinogradError("it is written for AVX2 and FMA, or AVX-512, which this processor lacks")
    try:
        import openvino
    except ImportError as error:
        raise WinogradError("openvino is not installed") from error
    home = Path(openvino.__file__).parent
    if not (home / "include" / "openvino").is_dir():
        raise WinogradError("this OpenVINO came without its headers")
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
            _try(built, vectors.lanes)
            library = folder / f"{name}-{sha256_file(built)}.so"
            with atomic_path(library) as temporary:
                shutil.copyfile(built, temporary)
    except (PoseCrafterError, OSError) as error:
        raise WinogradError(f"it cannot be kept: {error}") from error
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
        raise WinogradError("no C++ compiler was found: install g++, or name one in CXX")
    linked = [next(home.glob(f"libs/{name}.so*"), None) for name in ("libopenvino", "libtbb")]
    if None in linked:
        raise WinogradError("this OpenVINO came without its libraries, or without TBB")
    command = [*shlex.split(compiler), *FLAGS, *vectors.flags, "-I", str(home / "include"), *map(str, sources), "-o", str(library),
               *map(str, linked), f"-Wl,-rpath,{home / 'libs'}"]  # fmt: skip
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise WinogradError(f"{compiler} cannot be run: {error}") from error
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise WinogradError(f"{compiler} refuses it: {next((line for line in lines if 'error' in line), lines[-1])}")


def _try(library: Path, lanes: int) -> None:
    """Raise WinogradError unless what it does with a small picture is what OpenVINO does."""
    import openvino

    pixels = np.random.default_rng(0).normal(size=(2, lanes, 9, 13)).astype(np.float32)
    try:
        core = openvino.Core()
        core.add_extension(library)
        compiled = core.compile_model(_trials(_factory(library), lanes), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        outputs = list(compiled([pixels]).values())
    except RuntimeError as error:
        raise WinogradError(f"OpenVINO refuses it: {last_line(error)}") from error
    for own, tried in zip(outputs[::2], outputs[1::2], strict=True):
        if not np.abs(own - tried).max() <= TOLERANCE * np.abs(own).max():
            raise WinogradError("compiled here it does not give what OpenVINO's own convolution does")


def _trials(factory: Any, lanes: int) -> openvino.Model:
    """A convolution in tiles of either size, of a doubled picture, and after GroupNorm and SiLU: OpenVINO's and ours of each."""
    import openvino
    from openvino import opset13 as op

    rng = np.random.default_rng(1)
    pixels = op.parameter([2, lanes, 9, 13], np.float32)
    weight, bias, scale, shift = (
        op.constant(rng.normal(size=shape).astype(np.float32))
        for shape in ((2 * lanes, lanes, 3, 3), (2 * lanes,), (lanes,), (lanes,))
    )

    def by_channel(values: Any) -> Any:
        return op.unsqueeze(values, np.array([1, 2]))

    def own(of: Any) -> Any:
        return op.add(op.convolution(of, weight, [1, 1], [1, 1], [1, 1], [1, 1]), by_channel(bias))

    def ours(*more: Any, **attributes: Any) -> Any:
        return factory.create("Winograd", [node.output(0) for node in (pixels, weight, bias, *more)], attributes)

    rows, columns = (np.repeat(np.arange(side), 2) for side in (9, 13))
    doubled = op.gather(op.gather(pixels, rows, np.int64(2)), columns, np.int64(3))
    grouped = op.reshape(pixels, np.array([2, 4, -1]), special_zero=False)
    normed = op.mvn(grouped, np.array([2]), True, 1e-5, "INSIDE_SQRT")
    normed = op.reshape(normed, np.array([2, lanes, 9, 13]), special_zero=False)
    normed = op.add(op.multiply(normed, by_channel(scale)), by_channel(shift))
    active = op.multiply(normed, op.sigmoid(normed))
    outputs = [own(pixels), ours(), own(pixels), ours(tile=2), own(doubled), ours(times=2),
               own(active), ours(scale, shift, groups=4, eps=1e-5)]  # fmt: skip
    return openvino.Model(outputs, [pixels])
