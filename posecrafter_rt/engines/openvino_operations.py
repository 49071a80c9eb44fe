"""Operations for OpenVINO: 3×3 convolutions by Winograd's minimal filtering or in fewer bits, linear maps, attention.

Layer 4. They are C++ (operations/), compiled once per machine against the installed OpenVINO, and kept in the user's
cache. If that fails, OpenVINO's own operations are used; they are only slower.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from posecrafter_rt import config
from posecrafter_rt.atomic import atomic_path, sha256_file, sha256_json
from posecrafter_rt.blob_cache import MappedBlob
from posecrafter_rt.engines.base import BEYOND_FP16, CACHE_HINT, Precision, inner_precision
from posecrafter_rt.engines.openvino_trials import Trial, all_trials
from posecrafter_rt.errors import PoseCrafterError, last_line
from posecrafter_rt.machine import cpu_features, usable_cores

if TYPE_CHECKING:
    import openvino

SOURCES = Path(__file__).with_name("operations")
FLAGS = ("-std=c++17", "-O3", "-g0", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
         "-ffp-contract=fast")  # fmt: skip
COMPILE_S = 300  # a compiler that takes longer has hung
MAX_COMPILERS = 4  # at once; each takes up to 0.4 GB
# Compiled first, as a test: an instruction of the widest vectors, which the assembler must know, too.
TRIED = """#include <immintrin.h>
#ifdef __AMX_INT8__
void tried_tiles() { _tile_dpbusd(0, 1, 2); }
#endif
#ifdef __AVX512VNNI__
__m512i tried(__m512i a, __m512i b) { return _mm512_dpwssd_epi32(a, b, a); }
#elif defined(__AVXVNNI__)
__m256i tried(__m256i a, __m256i b) { return _mm256_dpbusd_avx_epi32(a, b, a); }
#endif
"""
# Relative to the largest value. Actual errors: float32 1e-5, 16 bits 1e-3, 8 bits 0.01.
TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "fp16": 5e-3, "int8": 0.05}
WHOLE_TOLERANCE = 5e-4  # for products of integers in 16 bits; the actual error is 1e-4
WITH_WEIGHTS = ("FusedConvolution", "Linear")  # those of our operations that have weights
REWRITING = 13  # part of the key of compiled networks: increase it if networks are rewritten differently

log = logging.getLogger(__name__)


class Vectors(NamedTuple):
    """The vector instructions that the operations are compiled for."""

    lanes: int  # floats per vector: input channels come in so many, output channels in twice as many
    needed: frozenset[str]  # features of the processor
    flags: tuple[str, ...]
    has_vnni: bool = False  # whether there are products of integers; otherwise weights in 16 bits are widened
    has_tiles: bool = False  # whether those are done in tiles (AMX); 16 bits are then two digits of 8


AVX2, AVX512 = frozenset({"avx2", "fma", "f16c"}), frozenset({"avx512f", "avx512_vnni"})
TILES = {"avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"}
TILES_FLAGS = ("-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16")
AVX512_FLAGS = ("-mavx512f", "-mavx512vnni", "-mprfchw")
VECTORS = (
    Vectors(16, AVX512 | TILES, (*AVX512_FLAGS, *TILES_FLAGS), has_vnni=True, has_tiles=True),
    Vectors(16, AVX512, AVX512_FLAGS, has_vnni=True),
    Vectors(16, frozenset({"avx512f"}), ("-mavx512f",)),
    Vectors(8, AVX2 | {"avx_vnni"}, ("-mavx2", "-mfma", "-mf16c", "-mavxvnni", "-mprfchw"), has_vnni=True),
    Vectors(8, AVX2, ("-mavx2", "-mfma", "-mf16c")),
)  # fmt: skip  # the widest first


class Operations(NamedTuple):
    """The compiled operations: the vectors they are compiled for, their nodes' factory, their products' precision."""

    vectors: Vectors
    factory: Any
    precision: Precision

    @property
    def lanes(self) -> int:
        """Floats per vector."""
        return self.vectors.lanes


class OperationsError(Exception):
    """Says in one line why the operations are not available here."""


class UnknownVectorsError(OperationsError):
    """The compiler does not know these vectors; it may know others."""


class Built(NamedTuple):
    """The compiled operations, or why there are none. left_out: why this processor's wider vectors are not used."""

    vectors: Vectors | None = None
    library: Path | None = None
    reason: str | None = None
    left_out: str | None = None


def missing_reason() -> str | None:
    """Return why the operations are not available here, or None. If need be, compile them, which takes seconds."""
    return _built(_fitting()).reason


def missing_bytes_reason() -> str | None:
    """Return why products in 8 bits are not available here, or None; may compile, as `missing_reason` does."""
    if not any(vectors.has_vnni for vectors in _fitting()[:1]):
        return "this processor has no VNNI; use fp32"
    reason, built = _missing_for("int8"), _built(_fitting())
    is_left_out = reason is None and built.vectors is not None and not built.vectors.has_vnni
    return f"int8 needs a compiler that knows VNNI: {built.left_out}" if is_left_out else reason


def missing_halves_reason() -> str | None:
    """Return why weights in 16 bits are not available here, or None; may compile, as `missing_reason` does."""
    return _missing_for("fp16")


def has_tiles() -> bool:
    """Return whether products are done in tiles (AMX) here; may compile, but not for a processor without them."""
    fitting = _fitting()
    vectors = _built(fitting).vectors if any(one.has_tiles for one in fitting) else None
    return vectors is not None and vectors.has_tiles


def left_out() -> str | None:
    """Return why the operations do not use all that this processor has, or None."""
    return _built(_fitting()).left_out


def _missing_for(precision: Precision) -> str | None:
    reason = missing_reason()
    return None if reason is None else f"{precision} needs operations that cannot be had here: {reason}"


def extend(core: openvino.Core) -> str | None:
    """Make the operations known to a core, so that it can read and compile models with them.

    Returns: what identifies their build, or None if there is none.
    """
    library = _built(_fitting()).library
    if library is None:
        return None
    core.add_extension(str(library))
    return library.stem


def operations(precision: Precision = "fp32") -> Operations | None:
    """Return the operations for this processor, or None if they are not available."""
    vectors, library, *_ = _built(_fitting())
    return None if vectors is None or library is None else Operations(vectors, _factory(library), precision)


def network_precision(name: str, precision: Precision) -> Precision:
    """As `inner_precision`, except that integers, which have a scale for each row, cannot leave float16's range.

    May compile, as `missing_reason` does, but not for a processor without products of integers.
    """
    may_differ = precision == "fp16" and name in BEYOND_FP16 and any(vectors.has_vnni for vectors in _fitting())
    available = operations(precision) if may_differ else None
    has_vnni = available is not None and available.vectors.has_vnni
    return precision if has_vnni else inner_precision(name, precision)


def hold_weights(model: openvino.Model, release: Callable[[], None]) -> None:
    """Let each of our operations in a model hold its weights, packed, in place of the constants that they are made of.

    release: called after each operation; what holds its constants may then let go of them. The model cannot be saved
        afterwards.
    """
    available = operations()
    nodes = [node for node in model.get_ordered_ops() if node.get_type_name() in WITH_WEIGHTS]
    while available is not None and nodes:
        node = nodes.pop()  # the last reference to its constants
        attributes = {**node.get_attributes(), "holds_weights": True}
        holding = available.factory.create(node.get_type_name(), node.input_values(), attributes)
        for own, held in zip(node.outputs(), holding.outputs(), strict=True):
            own.replace(held)
        del node, own
        release()


@contextmanager
def packing_from(blob: MappedBlob) -> Iterator[None]:
    """During the first run of a network whose weights lie in `blob`, keep only those in memory that are being packed.

    Afterwards none of them is in memory.
    """
    library = _built(_fitting()).library
    blob.release()
    if library is None:
        yield
    else:
        calls, first = ctypes.CDLL(str(library)), ctypes.c_void_p(blob.array.ctypes.data)
        calls.posecrafter_pack_from(first, ctypes.c_size_t(blob.array.nbytes))
        try:
            yield
        finally:
            calls.posecrafter_packed_from(first)
    blob.release()


def _fitting() -> tuple[Vectors, ...]:
    """Return the vectors that this processor has, the widest first."""
    features = cpu_features()
    return tuple(vectors for vectors in VECTORS if vectors.needed <= features)


@cache  # for good: with the last factory and core OpenVINO would unload the library, even if nodes are left
def _factory(library: Path) -> Any:
    from openvino.utils.node_factory import NodeFactory

    factory = NodeFactory()
    factory.add_extension(str(library))
    return factory


@cache
def _built(fitting: tuple[Vectors, ...]) -> Built:
    """Compile for the first of these vectors that the compiler here knows; if that fails, log why, once."""
    reason, unknown = "they are written for AVX2, FMA and F16C, or AVX-512, which this processor lacks", None
    for vectors in fitting:
        try:
            library = _compiled(vectors)
            return Built(vectors, library, left_out=unknown)
        except UnknownVectorsError as error:
            reason = unknown = str(error)
        except OperationsError as error:
            reason = str(error)
            break
    level = logging.WARNING if CACHE_HINT in reason else logging.INFO  # a processor or an installation is as it is
    log.log(level, "convolutions, linear maps and attention are OpenVINO's own, which are slower: %s", reason)
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
    name = sha256_json(key)
    try:
        cache, unsound = config.cache_dir(), dict[Path, str]()
        for kept in cache.glob(f"openvino_operations*/{name}-*.so"):  # one for each system that shares the cache
            reason = _unsound_reason(kept)
            if reason is None:
                return kept
            if reason:
                unsound[kept] = reason
        for kept, reason in unsound.items():
            log.warning("%s is compiled again if possible: %s", kept, reason)
        _ask(vectors)
        folder = cache / f"openvino_operations-{os.getuid()}"
        folder.mkdir(0o755, parents=True, exist_ok=True)
        if not folder.is_symlink():  # some mounts open every folder to a group; each library in it is verified
            with suppress(PermissionError):
                folder.chmod(folder.stat().st_mode & 0o7755)
        if _is_others(folder):
            raise PermissionError(f"other users may write to {folder}")
        # It was loaded below, for good, and NFS keeps the name of a file in use, so the folder may not become empty.
        with TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as building:
            built = Path(building) / "built.so"
            _compile([path for path in sources if path.suffix == ".cpp"], vectors, home, built)
            _try(built, vectors)
            library = folder / f"{name}-{sha256_file(built)}.so"
            with atomic_path(library) as temporary:
                shutil.copyfile(built, temporary)
                temporary.chmod(0o644)  # whatever the umask: see `_is_others`
    except (PoseCrafterError, OSError) as error:
        raise OperationsError(f"they cannot be kept: {error}; {CACHE_HINT}") from error
    return library


def _is_foreign(path: Path) -> bool:
    """Whether a file or folder belongs to another user (not to root)."""
    return path.lstat().st_uid not in (0, os.getuid())


def _is_others(path: Path) -> bool:
    """Whether a file or folder belongs to another user (not to root), or others may write to it, or it is a link.

    The name of a library is no secret: whoever can write to a shared cache could have everybody load code of his own.
    """
    return _is_foreign(path) or bool(path.lstat().st_mode & 0o022)


def _unsound_reason(library: Path) -> str | None:
    """Return None if a library compiled earlier is this user's, has the hash in its name and loads, else why not.

    "" for another user's. The cache may be another system's. Loading a damaged library would end the process.
    """
    try:
        if _is_foreign(library.parent) or _is_foreign(library):
            return ""
        if _is_others(library.parent) or _is_others(library):
            return "other users may write to it or to its folder"
        if not library.stem.endswith(sha256_file(library)):
            return "it was altered"
        _factory(library)
    except (OSError, RuntimeError) as error:
        return last_line(error)
    return None


def _compile(sources: list[Path], vectors: Vectors, home: Path, library: Path) -> None:
    linked = [next(home.glob(f"libs/{name}.so*"), None) for name in ("libopenvino", "libtbb")]
    if None in linked:
        raise OperationsError("this OpenVINO came without its libraries, or without TBB")
    flags, folder = (*FLAGS, *vectors.flags), library.parent

    def compile_one(source: Path) -> str | None:
        return _refusal(*flags, "-I", home / "include", "-c", source, "-o", folder / f"{source.stem}.o")

    # The slowest begin: first the source that includes OpenVINO's headers, then the longest.
    ordered = sorted(sources, key=lambda source: (source.stem != "extension", -source.stat().st_size))
    with ThreadPoolExecutor(min(usable_cores(), MAX_COMPILERS)) as pool:
        refusal = next(filter(None, pool.map(compile_one, ordered)), None)
    refusal = refusal or _refusal(*flags, *(folder / f"{source.stem}.o" for source in ordered), "-o", library, *linked,
                                  f"-Wl,-rpath,{home / 'libs'}")  # fmt: skip
    if refusal is not None:
        raise OperationsError(refusal)


def _ask(vectors: Vectors) -> None:
    """Raise UnknownVectorsError if the compiler or its assembler lacks these vectors; takes a fraction of a second."""
    refusal = _refusal(*vectors.flags, "-x", "c++", "-c", "-o", os.devnull, "-", given=TRIED)
    if refusal is not None:
        raise UnknownVectorsError(refusal)


def _refusal(*arguments: Any, given: str = "") -> str | None:
    """Run the compiler; return its complaint in one line, or None if it succeeds. given: its standard input."""
    compiler = config.compiler() or next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), "")
    if not compiler:
        raise OperationsError("no C++ compiler was found: install g++, or name one in CXX")
    try:
        command = [*shlex.split(compiler), *map(str, arguments)]
    except ValueError as error:
        raise OperationsError(f"the command in CXX, {compiler}, cannot be run: {error}") from error
    try:
        result = subprocess.run(
            command, input=given, capture_output=True, text=True, errors="replace", timeout=COMPILE_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise OperationsError(f"{compiler} cannot be run: {error}") from error
    if result.returncode == 0:
        return None
    lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
    return f"{compiler} refuses them: {next((line for line in lines if 'error' in line), lines[-1])}"


def _tolerance(trial: Trial, vectors: Vectors) -> float:
    is_whole = trial.precision == "fp16" and trial.is_narrow and vectors.has_vnni
    return WHOLE_TOLERANCE if is_whole else TOLERANCES[trial.precision]


def _try(library: Path, vectors: Vectors) -> None:
    """Raise OperationsError unless the library does with a small picture what OpenVINO's own operations do."""
    import openvino
    from openvino import opset13 as op

    shape = [2, vectors.lanes, 9, 13]
    try:
        parameter, factory = op.parameter(shape, np.float32), _factory(library)
    except RuntimeError as error:
        raise OperationsError(f"OpenVINO does not load them: {last_line(error)}") from error
    trials = [trial for trial in all_trials(factory, parameter) if trial.suits(vectors)]
    try:
        core = openvino.Core()
        core.add_extension(str(library))
        model = openvino.Model([node for trial in trials for node in (trial.own(), trial.ours())], [parameter])
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        outputs = list(compiled([np.random.default_rng(0).normal(size=shape).astype(np.float32)]).values())
    except RuntimeError as error:
        raise OperationsError(f"OpenVINO refuses them: {last_line(error)}") from error
    for trial, own, tried in zip(trials, outputs[::2], outputs[1::2], strict=True):
        with np.errstate(all="ignore"):  # memory that was not written may hold any bits
            is_near = np.abs(own - tried).max() <= _tolerance(trial, vectors) * np.abs(own).max()
        if not is_near:
            raise OperationsError("compiled here they do not give what OpenVINO's own operations do")
