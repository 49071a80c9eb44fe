"""What the extension takes as an array, what it refuses in which words, and that it gives every capsule back.

Tests of csrc/array.cpp, dlpack.h and bindings.cpp. The capsules are made here, field by field, to be wrong in one place.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.dlpack import to_dlpack

from posecrafter_rt.ops import affine_warp_paste, native
from posecrafter_rt.ops.reference import MODES

REASON = native.missing_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
if REASON is None:
    from posecrafter_rt import _native

CPU, CUDA, CUDA_HOST, ROCM = 1, 2, 3, 10
INTEGER, FLOAT = 0, 2


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_index", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


class Unversioned(ctypes.Structure):
    _fields_ = [("tensor", DLTensor), ("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p), ("flags", ctypes.c_uint64), ("tensor", DLTensor),
    ]  # fmt: skip


NEW_CAPSULE = ctypes.pythonapi.PyCapsule_New
NEW_CAPSULE.restype, NEW_CAPSULE.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
Int64s = ctypes.c_int64 * 4


class Exported:
    """A numpy array as an exporter of our own has it: every field open to change, every deletion counted."""

    def __init__(self, array: np.ndarray, *, is_versioned: bool = False, major: int = 1, flags: int = 0, **fields: Any):
        self.array, self.deletions = array, 0
        self.name = b"dltensor_versioned" if is_versioned else b"dltensor"
        self.managed = Versioned(major=major, flags=flags) if is_versioned else Unversioned()
        self.deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.on_delete)
        self.managed.deleter = ctypes.cast(self.deleter, ctypes.c_void_p)
        kind = {"i": INTEGER, "f": FLOAT}[array.dtype.kind]
        self.lists = {
            "shape": Int64s(*fields.pop("shape", array.shape)),
            "strides": Int64s(*fields.pop("strides", [step // array.itemsize for step in array.strides])),
        }
        values = {"data": array.ctypes.data, "device_type": CPU, "ndim": array.ndim, "code": kind,
                  "bits": 8 * array.itemsize, "lanes": 1, **self.lists, **fields}  # fmt: skip
        for field, value in values.items():
            setattr(self.managed.tensor, field, value)

    def on_delete(self, managed: int) -> None:
        assert managed == ctypes.addressof(self.managed)
        self.deletions += 1

    def capsule(self) -> Any:
        return NEW_CAPSULE(ctypes.addressof(self.managed), self.name, None)


class Exporter:
    """An array library's object: `__dlpack__` as given, and a device."""

    def __init__(self, export: Callable[..., Any], device_type: int = CPU) -> None:
        self.__dict__["export"] = export
        self.device_type = device_type

    def __dlpack__(self, **options: Any) -> Any:
        return self.export(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device_type, 0


def problem() -> dict[str, np.ndarray]:
    """Two frames of a 2 × 5 × 6 latent, the second edited in two regions; out is for both."""
    random = np.random.default_rng(0)
    return {
        "source": random.standard_normal((2, 5, 6), np.float32),
        "out": np.zeros((2, 2, 5, 6), np.float32),
        "affines": (np.eye(2, 3) + 0.1 * random.standard_normal((1, 2, 2, 3))).astype(np.float32),
        "rects": np.array([[[0, 0, 4, 4], [2, 1, 6, 5]]], np.int64),
    }


def expected(arrays: dict[str, np.ndarray], mode: str = "bilinear") -> np.ndarray:
    tensors = (torch.tensor(arrays[name]) for name in ("source", "affines", "rects"))
    return affine_warp_paste(*tensors, mode, backend="reference").numpy()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "wrap",
    [lambda array: array, torch.from_numpy, lambda array: to_dlpack(torch.from_numpy(array)),
     lambda array: torch.from_numpy(array).__dlpack__(max_version=(1, 0))],
    ids=["numpy", "torch", "capsule", "versioned capsule"],
)  # fmt: skip
def test_arrays_of_every_kind_are_taken(wrap: Callable[[np.ndarray], Any], mode: str) -> None:
    arrays = problem()
    _native.affine_warp_paste_cpu(*map(wrap, arrays.values()), mode)
    np.testing.assert_array_equal(arrays["out"], expected(arrays, mode))


@pytest.mark.parametrize("is_versioned", [False, True])
@pytest.mark.parametrize("fields", [{}, {"strides": None}, {"device_type": CUDA_HOST}], ids=str)
def test_a_capsule_is_used_once_and_deleted_once(is_versioned: bool, fields: dict[str, Any]) -> None:
    arrays = problem()
    arrays["source"].flags.writeable = False  # only out is written
    exported = {name: Exported(array, is_versioned=is_versioned) for name, array in arrays.items()}
    for field, value in fields.items():
        for each in exported.values():
            setattr(each.managed.tensor, field, value)
    capsules = [each.capsule() for each in exported.values()]
    _native.affine_warp_paste_cpu(*capsules)
    np.testing.assert_array_equal(arrays["out"], expected(arrays))
    assert [each.deletions for each in exported.values()] == [1, 1, 1, 1]
    assert all('"used_dltensor' in repr(capsule) for capsule in capsules)
    with pytest.raises(ValueError, match="source: the capsule was used before"):
        _native.affine_warp_paste_cpu(*capsules)
    del capsules
    gc.collect()
    assert [each.deletions for each in exported.values()] == [1, 1, 1, 1]


def test_an_exporter_without_a_deleter_is_none_the_worse() -> None:
    arrays = problem()
    exported = Exported(arrays["source"])
    exported.managed.deleter = None
    _native.affine_warp_paste_cpu(exported.capsule(), *list(arrays.values())[1:])
    np.testing.assert_array_equal(arrays["out"], expected(arrays))


def test_the_byte_offset_is_added() -> None:
    arrays = problem()
    padded = np.concatenate([np.full(3, np.nan, np.float32), arrays["source"].ravel()])
    shifted = Exported(arrays["source"], data=padded.ctypes.data, byte_offset=12)
    _native.affine_warp_paste_cpu(shifted.capsule(), *list(arrays.values())[1:])
    np.testing.assert_array_equal(arrays["out"], expected(arrays))


def test_arrays_are_let_go() -> None:
    arrays = problem()
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    counts = {name: sys.getrefcount(array) for name, array in arrays.items()}
    alive = [weakref.ref(tensor) for tensor in tensors.values()]
    for _ in range(50):
        _native.affine_warp_paste_cpu(*arrays.values())
        _native.affine_warp_paste_cpu(*tensors.values())
        with pytest.raises(ValueError):
            _native.affine_warp_paste_cpu(*arrays.values(), "cubic")
    assert {name: sys.getrefcount(array) for name, array in arrays.items()} == counts
    del tensors
    gc.collect()
    assert not [reference for reference in alive if reference() is not None]


NUMPY_REFUSALS: dict[str, tuple[dict[str, Callable[[np.ndarray], Any]], str]] = {
    "strided out": ({"out": lambda a: np.zeros((2, 2, 5, 12), np.float32)[..., ::2]}, "out: rows must be contiguous"),
    "strided source": ({"source": lambda a: np.asfortranarray(a)}, "source: rows must be contiguous"),
    "strided affines": ({"affines": lambda a: a[..., ::-1]}, "affines: rows must be contiguous"),
    "double out": ({"out": lambda a: a.astype(np.float64)}, "out: want float32, float16 or bfloat16; it is float64"),
    "another type": ({"source": lambda a: a.astype(np.float16)}, "source: want the type of out; it is float16"),
    "double affines": ({"affines": lambda a: a.astype(np.float64)}, "affines: want float32; it is float64"),
    "short rects": ({"rects": lambda a: a.astype(np.int32)}, "rects: want int64; it is int32"),
    "unsigned rects": ({"rects": lambda a: a.astype(np.uint64)}, "rects: want int64; it is uint64"),
    "flat out": ({"out": lambda a: a.ravel()}, r"out: want sizes \(F, C, h, w\); it is float32 \(120\) on cpu"),
    "no channels": ({"out": lambda a: a[:, :0].copy()}, "channels = 0 is out of range"),
    "another size": ({"source": lambda a: a[:, 1:].copy()}, r"source: want sizes \(C, h, w\) of out"),
    "too few sources": ({"source": lambda a: a[None]}, r"source: want sizes \(F, C, h, w\) of out, or without F"),
    "flat source": ({"source": lambda a: a[0]}, r"source: want sizes \(F, C, h, w\) of out, or without F"),
    "flat affines": ({"affines": lambda a: a[0]}, r"affines: want sizes \(N, R, 2, 3\)"),
    "square affines": ({"affines": lambda a: a[..., :2].copy()}, r"affines: want sizes \(N, R, 2, 3\)"),
    "fewer rects": ({"rects": lambda a: a[:, :1].copy()}, r"rects: want sizes \(N, R, 4\) of affines"),
    "more edits than frames": (
        {"affines": lambda a: np.repeat(a, 3, 0), "rects": lambda a: np.repeat(a, 3, 0)},
        "affines: more edits than out has frames",
    ),
    "too many regions": (
        {"affines": lambda a: np.zeros((1, 1025, 2, 3), "f4"), "rects": lambda a: np.zeros((1, 1025, 4), "i8")},
        "regions = 1025 exceeds 1024",
    ),
    "none": ({"out": lambda a: None}, "out: NoneType is no array"),
    "address": ({"source": lambda a: a.ctypes.data}, "source: int is no array"),
}


@pytest.mark.parametrize("case", NUMPY_REFUSALS)
def test_what_does_not_fit_is_refused(case: str) -> None:
    changes, message = NUMPY_REFUSALS[case]
    arrays: dict[str, Any] = problem()
    for name, change in changes.items():
        arrays[name] = change(arrays[name])
    with pytest.raises(TypeError if "no array" in message else ValueError, match=message):
        _native.affine_warp_paste_cpu(*arrays.values())


def test_a_read_only_out_and_an_unknown_mode_are_refused() -> None:
    arrays = problem()
    with pytest.raises(ValueError, match="unknown mode cubic"):
        _native.affine_warp_paste_cpu(*arrays.values(), "cubic")
    arrays["out"].flags.writeable = False
    with pytest.raises(ValueError, match="(?i)out: .*read-?only"):
        _native.affine_warp_paste_cpu(*arrays.values())
    assert not arrays["out"].any()


def test_memory_that_is_written_is_nobody_elses() -> None:
    arrays = problem()
    out, edits = arrays["out"], (arrays["affines"], arrays["rects"])
    for source in (out[0], out[1], out):
        with pytest.raises(ValueError, match="source: shares memory with out"):
            _native.affine_warp_paste_cpu(source, out, *edits)
    inside = out.reshape(-1)[:12].reshape(1, 2, 2, 3)
    with pytest.raises(ValueError, match="affines: shares memory with out"):
        _native.affine_warp_paste_cpu(arrays["source"], out, inside, arrays["rects"])
    inside = out.reshape(-1)[:16].view(np.int64).reshape(1, 2, 4)
    with pytest.raises(ValueError, match="rects: shares memory with out"):
        _native.affine_warp_paste_cpu(arrays["source"], out, arrays["affines"], inside)
    out[:] = arrays["source"]
    _native.affine_warp_paste_cpu(out, out, *edits, copy=False)  # in place: allowed
    np.testing.assert_array_equal(out, expected(arrays))


HUGE = 2**62
BROKEN = {
    "another version": ({"is_versioned": True, "major": 2}, "DLPack version 2 is not known here"),
    "read-only": ({"is_versioned": True, "flags": 1}, "is read-only, and would be written"),
    "on CUDA": ({"device_type": CUDA}, r"want memory of the CPU; it is float32 \(2, 2, 5, 6\) on cuda:0"),
    "on another device": ({"device_type": ROCM}, "want memory of the CPU; it is float32 .* on device type 10"),
    "vectors": ({"lanes": 4}, "elements that are no whole numbers"),
    "half bytes": ({"bits": 4}, "elements that are no whole numbers"),
    "an unknown type": ({"code": 99}, "want float32, float16 or bfloat16; it is type 99, bits 32"),
    "many dimensions": ({"ndim": 99}, "a broken shape"),
    "negative dimensions": ({"ndim": -1}, "a broken shape"),
    "no shape": ({"shape": None}, "a broken shape"),
    "a negative size": ({"shape": (2, 2, -5, 6)}, "a negative size"),
    "an absurd size": ({"shape": (HUGE, 2, 5, 6), "strides": (60, 30, 6, 1)}, "more bytes than there can be"),
    "a long frame": ({"shape": (1, 1, 2**20, 2**20), "strides": (1, 1, 2**20, 1)}, "height × width = .* out of range"),
    "no frames, endless rows": ({"shape": (0, 1, 1, 2**31)}, "width = 2147483648 is out of range"),
    "null": ({"data": None}, "null data"),
    "off its elements": ({"byte_offset": 2}, "data that is not aligned to its elements"),
    "broadcast": ({"strides": (0, 30, 6, 1)}, "rows must be contiguous"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_capsules_are_refused_and_given_back(case: str) -> None:
    fields, message = BROKEN[case]
    arrays: dict[str, Any] = problem()
    no_shape = "shape" in fields and fields["shape"] is None
    exported = Exported(arrays["out"], **({} if no_shape else fields))
    if no_shape:
        exported.managed.tensor.shape = None
    arrays["out"] = exported.capsule()
    with pytest.raises(ValueError, match="^(out: )?" + message):
        _native.affine_warp_paste_cpu(*arrays.values())
    assert exported.deletions == 1 and not exported.array.any()


@pytest.mark.parametrize("name", [b"numpy.ndarray", b"", b"dltensor_versioned_2", None])
def test_other_peoples_capsules_are_left_alone(name: bytes | None) -> None:
    exported = Exported(problem()["source"])
    exported.name = name
    with pytest.raises(ValueError, match="source: a capsule named .* is no DLPack tensor"):
        _native.affine_warp_paste_cpu(exported.capsule(), *list(problem().values())[1:])
    assert exported.deletions == 0


def test_exporters_older_than_versions_are_asked_again() -> None:
    arrays: dict[str, Any] = problem()
    source = Exported(arrays["source"])
    asked = []

    def export(stream: object = None) -> Any:  # no max_version
        asked.append(stream)
        return source.capsule()

    _native.affine_warp_paste_cpu(Exporter(export), *list(arrays.values())[1:])
    np.testing.assert_array_equal(arrays["out"], expected(arrays))
    assert asked == [None] and source.deletions == 1


def test_what_an_exporter_says_is_passed_on() -> None:
    rest = list(problem().values())[1:]

    def refuse(**options: Any) -> Any:
        raise BufferError("not today")

    def crash(**options: Any) -> Any:
        raise ZeroDivisionError("a fault of its own")

    with pytest.raises(ValueError, match="source: not today"):
        _native.affine_warp_paste_cpu(Exporter(refuse), *rest)
    with pytest.raises(ZeroDivisionError, match="a fault of its own"):
        _native.affine_warp_paste_cpu(Exporter(crash), *rest)
    with pytest.raises(TypeError, match="source: no capsule came"):
        _native.affine_warp_paste_cpu(Exporter(lambda **options: 7), *rest)


@pytest.mark.skipif(not native.build_info().get("cuda"), reason="the extension is built without CUDA")
@pytest.mark.parametrize(("stream", "told"), [(0, 1), (2, 2), (0xBEEF0, 0xBEEF0)])
def test_exporters_on_cuda_are_told_the_stream_and_devices_must_agree(stream: int, told: int) -> None:
    streams = []

    def exporter(array: np.ndarray, **fields: Any) -> Exporter:
        exported = Exported(array, device_type=CUDA, **fields)

        def export(**options: Any) -> Any:
            streams.append(options["stream"])
            return exported.capsule()

        return Exporter(export, CUDA)

    arrays = problem()
    on_device: dict[str, Any] = {name: exporter(array) for name, array in arrays.items()}
    on_device["rects"] = exporter(arrays["rects"], device_index=1)
    with pytest.raises(ValueError, match=r"rects: want memory of one CUDA device; it is int64 .* on cuda:1"):
        _native.affine_warp_paste_cuda(*on_device.values(), stream=stream)
    assert streams == [told] * 4
    with pytest.raises(ValueError, match=r"source: want memory of one CUDA device; it is float32 .* on cpu"):
        _native.affine_warp_paste_cuda(*arrays.values(), stream=stream)


@pytest.mark.skipif(not native.build_info().get("cuda"), reason="the extension is built without CUDA")
def test_more_pixels_than_the_cuda_path_takes_are_refused() -> None:
    arrays, width = problem(), 65535 * 256 + 1  # odd, so that a thread owns one pixel
    arrays["source"], arrays["out"] = (np.zeros((n, 1, 1, width), np.float16) for n in (2, 2))
    exported = [Exported(array, device_type=CUDA) for array in arrays.values()]
    with pytest.raises(ValueError, match="height × width = 16776961 exceeds 16776960"):
        _native.affine_warp_paste_cuda(*(each.capsule() for each in exported))
