"""What only the OpenVINO backend has: kept compilations, static shapes, bf16 and int8, networks in full precision."""

from __future__ import annotations

import errno
import gc
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from torch import Tensor

from posecrafter_rt.blob_cache import MappedBlob
from posecrafter_rt.engines import openvino as backend_module
from posecrafter_rt.engines import openvino_ir
from posecrafter_rt.engines import openvino_operations as operations
from posecrafter_rt.engines.base import BEYOND_FP16, FULL_PRECISION, Precision
from posecrafter_rt.engines.manifest import write_manifest
from posecrafter_rt.engines.openvino import KEPT_SHAPES, OpenVinoBackend, OpenVinoEngine
from posecrafter_rt.engines.openvino_norms import normalise_by_channel
from posecrafter_rt.engines.openvino_weights import SharedWeights
from posecrafter_rt.engines.tuned_file import TUNED_FILE
from posecrafter_rt.errors import CheckpointError, EngineFolderError
from posecrafter_rt.export.shapes import random_inputs
from posecrafter_rt.export.verify import relative_error
from posecrafter_rt.machine import cpu_has_bf16
from posecrafter_rt.models.loading import PoseModel, named_parameters
from posecrafter_rt.spec import RUN_ONCE, network_specs
from tests.tiny import NETWORKS, link_the_rest, some_tuned

needs_bf16 = pytest.mark.skipif(not cpu_has_bf16(), reason="this processor has no bf16")


def load(
    model: PoseModel, networks: Path, cache: Path, precision: Precision = "fp32", **options: Any
) -> dict[str, Any]:
    return OpenVinoBackend(**options).load(networks, model.architecture(), precision, cache)


def draw(model: PoseModel, name: str, frames: int, groups: int = 1) -> dict[str, Tensor]:
    sizes = {"frames": frames, "groups": groups, "steps": frames, "window": 3, "height": 32, "width": 32}
    return random_inputs(network_specs(model.architecture())[name], sizes, seed=frames)


def first(outputs: dict[str, Tensor]) -> Tensor:
    return next(iter(outputs.values()))


def expected(model: PoseModel, name: str, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.networks()[name](*inputs.values())[0]


@needs_bf16
@pytest.mark.parametrize("name", NETWORKS)
def test_bf16_over_changing_frame_counts(
    plain_model: PoseModel, openvino_networks: Path, tmp_path: Path, name: str
) -> None:
    engine = load(plain_model, openvino_networks, tmp_path, "bf16")[name]
    for frames in (1, 16, 1, 7):
        inputs = draw(plain_model, name, frames)
        error = relative_error(first(engine(**inputs)), expected(plain_model, name, inputs))
        if name in FULL_PRECISION:
            assert error < 1e-5
        else:
            assert 1e-5 < error < 0.03  # of bf16's 8 bits, and not of float32's 24


def over_frame_counts(
    model: PoseModel, networks: Path, cache: Path, precision: Precision, name: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """What one engine gives over changing frame counts, and one that is loaded anew gives alike, and what PyTorch does."""
    engine = load(model, networks, cache, precision)[name]
    for frames in (1, 16, 1, 7):
        inputs = draw(model, name, frames)
        found = first(engine(**inputs))
        anew = load(model, networks, cache, precision)[name]
        assert torch.equal(first(anew(**inputs)), found)
        yield found, expected(model, name, inputs)


def often(*names: str) -> list[Any]:
    """Every network; those that are not named here are slow tests."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]


@pytest.mark.parametrize("name", often("unet", "controlnet_stream", "vae_decoder", "prompt_kv"))
def test_fp16_over_changing_frame_counts(
    plain_model: PoseModel, openvino_networks: Path, tmp_path: Path, name: str, operation: None
) -> None:
    """The decoder stays in float32, but where whole numbers hold what float16 does not."""
    available = operations.operations("fp16")
    has_vnni = available is not None and available.vectors.has_vnni
    exact = FULL_PRECISION if has_vnni else (*FULL_PRECISION, *BEYOND_FP16)
    for found, wanted in over_frame_counts(plain_model, openvino_networks, tmp_path, "fp16", name):
        error = relative_error(found, wanted)
        assert error < 1e-5 if name in exact else 1e-5 < error < 2e-3


@pytest.mark.parametrize("name", often("unet", "controlnet_stream", "vae_decoder", "pose_embedding", "prompt_kv"))
def test_int8_over_changing_frame_counts(
    plain_model: PoseModel, openvino_networks: Path, tmp_path: Path, name: str, byte_operation: None
) -> None:
    for found, wanted in over_frame_counts(plain_model, openvino_networks, tmp_path, "int8", name):
        error = float((found - wanted).norm() / wanted.norm())
        if name in FULL_PRECISION:
            assert error < 1e-5
        else:
            assert 1e-3 < error < 10 ** (-30 / 20)  # 30 dB, and of 8 bits


def test_what_is_kept_is_of_one_precision(
    plain_model: PoseModel, openvino_networks: Path, tmp_path: Path, byte_operation: None
) -> None:
    inputs = draw(plain_model, "pose_embedding", 2)
    whole, narrow, in_halves, again = (
        first(load(plain_model, openvino_networks, tmp_path, precision)["pose_embedding"](**inputs)).clone()
        for precision in ("fp32", "int8", "fp16", "fp32")
    )
    assert torch.equal(whole, again) and not torch.equal(whole, narrow)
    # Its convolutions are too small for tiles of 2×2, which is otherwise all that fp16 changes, but it is another's.
    available = operations.operations("fp16")
    assert torch.equal(whole, in_halves) != (available is not None and available.vectors.has_vnni)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.fixture(scope="module")
def others(
    make_tiny_model: Callable[..., PoseModel], openvino_networks: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PoseModel, Path, Path]:
    """A model tuned in other ways, and its networks as built and as refitted: float32, whatever they are compiled for."""
    model, generator = make_tiny_model(), torch.Generator().manual_seed(9)
    model.tuned = some_tuned(model)
    for name, parameter in named_parameters(model):
        if name in model.tuned:
            parameter.data.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
    model.fold()
    arch, built, refitted = (
        replace(model.architecture(), size=(32, 32)),
        *map(tmp_path_factory.mktemp, ("built", "refitted")),
    )
    OpenVinoBackend().build(model, arch, built, "int8", lambda stage: None)
    OpenVinoBackend().refit(openvino_networks, refitted, model, arch, "int8", lambda stage: None)
    assert [file.name for file in refitted.iterdir()] == [TUNED_FILE]
    link_the_rest(openvino_networks, refitted)
    return model, built, refitted


@pytest.mark.parametrize(("precision", "networks"), [("int8", ("unet", "vae_decoder")), ("fp16", ("unet",))])
def test_other_weights_give_what_a_build_with_them_gives(
    others: tuple[PoseModel, Path, Path], openvino_networks: Path, tmp_path: Path, byte_operation: None,
    precision: Precision, networks: tuple[str, ...],
) -> None:  # fmt: skip
    """Swapped into an engine or refitted: weights are rounded as those that it is built with."""
    model, *folders = others
    kept = [load(model, folder, tmp_path / "compiled", precision) for folder in (openvino_networks, *folders)]
    for name in networks:
        source, built, refitted = (engines[name] for engines in kept)
        inputs = draw(model, name, 3)
        before, wanted = (first(engine(**inputs)).clone() for engine in (source, built))
        assert not torch.equal(before, wanted)
        assert torch.equal(first(refitted(**inputs)), wanted)
        source.swap_weights(dict(model.networks()[name].named_parameters()))
        assert torch.equal(first(source(**inputs)), wanted)


@needs_bf16
def test_code_apart_from_the_bases_weights_holds_the_tuned_ones(
    plain_model: PoseModel, openvino_networks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As bf16 has it: the file of weights has zeros in their place."""
    inputs = draw(plain_model, "controlnet", 3)
    before = first(load(plain_model, openvino_networks, tmp_path, "bf16")["controlnet"](**inputs)).clone()
    monkeypatch.setattr(OpenVinoEngine, "_read", None)  # so that nothing can be compiled
    assert torch.equal(first(load(plain_model, openvino_networks, tmp_path, "bf16")["controlnet"](**inputs)), before)


def test_another_process_compiles_nothing(
    plain_model: PoseModel, openvino_networks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = draw(plain_model, "controlnet", 3)
    before = first(load(plain_model, openvino_networks, tmp_path)["controlnet"](**inputs)).clone()
    largest = max(path.stat().st_size for path in openvino_networks.iterdir())
    assert all(path.stat().st_size < largest for path in tmp_path.iterdir())  # weights are not in them

    def compiled_again(*args: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(OpenVinoEngine, "_read", compiled_again)
    assert torch.equal(first(load(plain_model, openvino_networks, tmp_path)["controlnet"](**inputs)), before)
    for other in (draw(plain_model, "controlnet", 2), draw(plain_model, "controlnet", 4, groups=2)):
        with pytest.raises(AssertionError, match="compiled again"):
            load(plain_model, openvino_networks, tmp_path)["controlnet"](**other)
    with pytest.raises(AssertionError, match="compiled again"):
        load(plain_model, openvino_networks, tmp_path, num_threads=1)["controlnet"](**inputs)


@pytest.mark.parametrize("asked", [None, 2])
def test_a_quota_of_cores_limits_the_threads_unless_others_were_asked_for(
    asked: int | None, plain_model: PoseModel, openvino_networks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posecrafter_rt.engines.openvino.core_quota", lambda: 1)
    inputs = draw(plain_model, "pose_embedding", 1)
    engine = load(plain_model, openvino_networks, tmp_path, num_threads=asked)["pose_embedding"]
    compiled = engine._compile_anew(engine.spec, tuple(tuple(tensor.shape) for tensor in inputs.values()))
    wanted = asked or 1
    assert OpenVinoBackend(asked)._properties("fp32")["INFERENCE_NUM_THREADS"] == wanted
    visible = len(os.sched_getaffinity(0))  # OpenVINO itself takes no more than these
    assert compiled.get_property("INFERENCE_NUM_THREADS") == min(wanted, visible)


def test_what_cannot_be_imported_is_compiled_again(
    plain_model: PoseModel, openvino_networks: Path, tmp_path: Path
) -> None:
    inputs = draw(plain_model, "pose_embedding", 2)
    before = first(load(plain_model, openvino_networks, tmp_path)["pose_embedding"](**inputs)).clone()
    (blob,) = tmp_path.iterdir()
    engine = load(plain_model, openvino_networks, tmp_path)["pose_embedding"]
    other = tmp_path / "other"
    other.write_bytes(b"of another build" + bytes(32))
    engine._cache = SimpleNamespace(map=lambda key: MappedBlob(other), save=lambda key, blob: None)
    assert torch.equal(first(engine(**inputs)), before)
    blob.write_bytes(blob.read_bytes()[:-7])
    assert torch.equal(first(load(plain_model, openvino_networks, tmp_path)["pose_embedding"](**inputs)), before)


@pytest.mark.parametrize("name", ["pose_embedding", "prompt_kv"])  # whose weights are in what is kept, and apart
@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.parametrize("maps", [b"of another build", None])
def test_where_it_cannot_be_kept_it_is_compiled_once(
    plain_model: PoseModel, openvino_networks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    name: str, saves: bool, maps: bytes | None,
) -> None:  # fmt: skip
    engine, compiled = load(plain_model, openvino_networks, tmp_path)[name], list[Any]()
    (tmp_path / "other").write_bytes((maps or b"") + bytes(32))
    engine._cache = SimpleNamespace(map=lambda key: None if maps is None else MappedBlob(tmp_path / "other"),
                                    save=lambda key, blob: saves)  # fmt: skip
    compile_anew = engine._compile_anew
    monkeypatch.setattr(engine, "_compile_anew", lambda *given: compiled.append(given) or compile_anew(*given))
    inputs = draw(plain_model, name, 1)
    assert relative_error(first(engine(**inputs)), expected(plain_model, name, inputs)) < 1e-5
    assert len(compiled) == 1


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell what memory holds")
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_weights_lie_in_the_file_and_are_let_go_of(
    plain_model: PoseModel, openvino_networks: Path, tmp_path: Path, operation: None, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch, precision: Precision,
) -> None:  # fmt: skip
    """In the process that compiled and in one that did not; while they are packed, too. Nobody has written to them; frames that
    outlive them stay.
    """
    if precision == "int8":
        request.getfixturevalue("byte_operation")
    inputs, read = draw(plain_model, "unet", 2), list[dict[str, int]]()

    def release(blob: MappedBlob) -> None:
        (path,) = tmp_path.glob("*.blob")
        found = mapping(path)
        assert found is not None
        read.append(found)
        let_go(blob)

    let_go = MappedBlob.release
    monkeypatch.setattr(MappedBlob, "release", release)
    for _ in range(2):
        engine = load(plain_model, openvino_networks, tmp_path, precision)["unet"]
        found = first(engine(**inputs))
        (blob,) = tmp_path.glob("*.blob")
        now = mapping(blob)
        assert now is not None and now["Rss"] == 0  # until it is read again
        wanted = found.clone()
        assert torch.equal(first(engine(**inputs)), wanted)
        del engine
        gc.collect()
        assert torch.equal(found, wanted) and mapping(blob) is None
    assert all(facts["Anonymous"] == facts["Private_Dirty"] == 0 for facts in read)
    hashed, imported, ran = read[::3], read[1::3], read[2::3]
    assert [len(hashed), len(imported), len(ran)] == [2, 2, 2]
    assert all(facts["Rss"] > 0 for facts in (*hashed, *imported))
    assert all(facts["Rss"] == 0 for facts in ran)  # what is packed last lets go of all that was packed before


def mapping(path: Path) -> dict[str, int] | None:
    """Of the only part of this process's memory that is a file, kilobytes by what the system calls them."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    found = [part for part in parts if part.partition("\n")[0].endswith(f" {path.resolve()}")]
    if not found:
        return None
    (part,) = found
    return {name: int(number) for name, number in re.findall(r"^(\w+): +(\d+) kB", part, re.MULTILINE)}


def test_swapped_weights_are_never_taken_from_the_cache(
    plain_model: PoseModel, openvino_networks: Path, tmp_path: Path
) -> None:
    inputs = draw(plain_model, "controlnet", 2)
    engine = load(plain_model, openvino_networks, tmp_path)["controlnet"]
    before = first(engine(**inputs)).clone()
    name = "controlnet.conv_in.weight"
    weight = dict(plain_model.networks()["controlnet"].named_parameters())[name].detach()
    assert engine.swap_weights({name: weight * 2, "unet.conv_in.weight": weight}) == {name}
    assert not torch.equal(first(engine(**inputs)), before)
    assert len(list(tmp_path.iterdir())) == 1
    engine.swap_weights({name: weight})
    assert torch.equal(first(engine(**inputs)), before)
    again = load(plain_model, openvino_networks, tmp_path)["controlnet"]
    assert torch.equal(first(again(**inputs)), before)


def test_weights_that_float32_does_not_hold_are_refused(
    make_tiny_model: Callable[..., PoseModel], plain_model: PoseModel, openvino_networks: Path, tmp_path: Path
) -> None:
    """Where they are swapped, built or refitted; a swap that is refused changes nothing."""
    name, inputs = "controlnet.mid_block.resnets.0.conv1.bias", draw(plain_model, "controlnet", 2)
    engine = load(plain_model, openvino_networks, tmp_path / "compiled")["controlnet"]
    before = first(engine(**inputs)).clone()
    weights = dict(plain_model.networks()["controlnet"].named_parameters())
    other = "controlnet.mid_block.resnets.0.conv1.weight"
    others = {other: torch.zeros_like(weights[other])}
    with pytest.raises(CheckpointError, match=rf"^{name} does not fit torch\.float32$"):
        engine.swap_weights({**others, name: torch.full_like(weights[name], 1e39, dtype=torch.float64)})
    assert torch.equal(first(engine(**inputs)), before)

    model = make_tiny_model()
    model.tuned = some_tuned(model)
    model.unet.gives_deep_features = True
    model.fold()
    model.controlnet.get_parameter(name.partition(".")[2]).data[0] = torch.nan
    arch, backend = replace(model.architecture(), size=(32, 32)), OpenVinoBackend()
    for number, write in enumerate((backend.build, partial(backend.refit, openvino_networks))):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(EngineFolderError, match=rf"^{name} does not fit torch\.float32$"):
            write(model=model, arch=arch, folder=folder, precision="fp32", progress=lambda stage: None)
        assert not list(folder.glob("controlnet.*"))


@pytest.mark.parametrize(("large_bytes", "available", "kept"), [
    (1 << 28, 0, KEPT_SHAPES), (0, 1 << 40, KEPT_SHAPES), (0, 0, 1),
])  # fmt: skip
def test_few_compiled_shapes_are_kept_and_outputs_outlive_them(
    plain_model: PoseModel, openvino_networks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    large_bytes: int, available: int, kept: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(backend_module, "LARGE_BYTES", large_bytes)
    monkeypatch.setattr(backend_module, "available_bytes", lambda: available)
    engine = load(plain_model, openvino_networks, tmp_path)["pose_embedding"]
    inputs = draw(plain_model, "pose_embedding", 1)
    oldest = first(engine(**inputs))
    for frames in range(2, KEPT_SHAPES + 3):
        engine(**draw(plain_model, "pose_embedding", frames))
    gc.collect()
    assert len(engine._requests) == kept
    assert relative_error(oldest, expected(plain_model, "pose_embedding", inputs)) < 1e-5
    newest = draw(plain_model, "pose_embedding", 3)
    engine(**newest)
    assert list(engine._requests)[-1] == (tuple(newest["controlnet_cond"].shape),)


def test_inputs_are_read_where_they_lie_whatever_lay_there_before(
    plain_model: PoseModel, openvino_networks: Path, tmp_path: Path
) -> None:
    engine, inputs = load(plain_model, openvino_networks, tmp_path)["unet"], draw(plain_model, "unet", 2)
    expected = first(engine(**inputs)).clone()
    others = {key: tensor if tensor.dtype == torch.int64 else tensor * 0.5 for key, tensor in inputs.items()}
    elsewhere = first(engine(**others)).clone()
    assert relative_error(elsewhere, expected) > 0.01
    assert torch.equal(first(engine(**inputs)), expected)
    for key, tensor in inputs.items():  # where they were read just now
        tensor.copy_(others[key])
    assert torch.equal(first(engine(**inputs)), elsewhere)
    inputs["latents"] = inputs["latents"].transpose(2, 3).contiguous().transpose(2, 3)  # as read, made for the call
    assert torch.equal(first(engine(**inputs)), elsewhere)


def test_an_interrupt_while_inputs_are_bound_leaves_none_that_is_not_read(
    plain_model: PoseModel, openvino_networks: Path, tmp_path: Path
) -> None:
    engine, inputs = load(plain_model, openvino_networks, tmp_path)["unet"], draw(plain_model, "unet", 2)
    expected = first(engine(**inputs)).clone()
    (request,) = engine._requests.values()
    bound = request._request

    class Interrupted:
        def set_input_tensor(self, index: int, tensor: Any) -> None:
            bound.set_input_tensor(index, tensor)
            raise KeyboardInterrupt

    request._request = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        engine(**{**inputs, "latents": inputs["latents"] * 2})
    request._request = bound
    assert torch.equal(first(engine(**inputs)), expected)


@pytest.mark.parametrize(("name", "kept"), [*((name, 0) for name in RUN_ONCE), ("vae_decoder", 1)])
def test_a_network_that_runs_once_is_let_go_of(
    plain_model: PoseModel, openvino_networks: Path, tmp_path: Path, name: str, kept: int
) -> None:
    """What it gave stays as it is, and the next call gives the same."""
    engine, inputs = load(plain_model, openvino_networks, tmp_path)[name], draw(plain_model, name, 1)
    expected = first(engine(**inputs)).clone()
    found = first(engine(**inputs))
    assert len(engine._requests) == kept
    engine(**{key: tensor if tensor.dtype == torch.int64 else tensor + 1 for key, tensor in inputs.items()})
    again = first(engine(**inputs))
    gc.collect()
    assert torch.equal(found, expected) and torch.equal(again, expected)


def test_a_folder_without_its_networks_is_refused(plain_model: PoseModel, tmp_path: Path) -> None:
    write_manifest(tmp_path, {"backend": "openvino", "precision": "fp32"})
    with pytest.raises(EngineFolderError, match="holds no networks") as caught:
        load(plain_model, tmp_path / "networks", tmp_path / "cache")
    command = f"posecrafter-rt build-engine tuned.ckpt -o {tmp_path} --backend openvino --precision fp32 --force"
    assert caught.value.hint == f"build it again: {command}"


def test_operations_are_not_compiled_to_say_what_other_precisions_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*vectors: object) -> None:
        raise AssertionError("they were compiled")

    for module in (backend_module, operations):
        monkeypatch.setattr(module, "missing_reason", asked)
    monkeypatch.setattr(operations, "_built", asked)
    for precision in ("fp32", "bf16"):
        OpenVinoBackend().unsupported_reason(precision)
    monkeypatch.setattr(operations, "cpu_features", lambda: {"avx2", "fma"})
    assert OpenVinoBackend().unsupported_reason("int8") == "this processor has no VNNI; use fp32"
    monkeypatch.setattr(operations, "cpu_features", lambda: {"avx2", "fma", "f16c"})
    assert {name: operations.network_precision(name, "fp16") for name in ("unet", "vae_decoder")} == {
        "unet": "fp16",
        "vae_decoder": "fp32",
    }


def test_bf16_is_refused_on_arm_where_openvino_would_compute_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posecrafter_rt.machine.cpu_features", lambda: {"asimd", "bf16"})
    assert OpenVinoBackend().unsupported_reason("bf16") == "it has no bf16 on this processor; use fp32"


@pytest.mark.parametrize(("free", "number"), [(10, errno.ENOSPC), (10**12, None)])
def test_a_full_disk_is_told_from_other_failures(
    openvino_networks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, number: int | None
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(openvino, "save_model", fails)
    monkeypatch.setattr(openvino_ir.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(OSError if number else RuntimeError) as caught:
        source, path = openvino_networks / "unet.xml", tmp_path / "unet.xml"
        openvino_ir.save_ir(openvino.Core(), source, path, {}, (), SharedWeights(tmp_path / "unet.bin"))
    assert getattr(caught.value, "errno", None) == number


def norm_model(scale: float, axis: int = 2, eps_mode: str = "INSIDE_SQRT") -> Any:
    """GroupNorm of 2 groups as ONNX brings it, with a factor within; parameter `x` (2, 8, 5, 6)."""
    import openvino
    from openvino import opset13 as op

    x = op.parameter([2, 8, 5, 6], np.float32, "x")
    grouped = op.reshape(x, np.array([2, 2, -1]), special_zero=False)
    normalised = op.mvn(grouped, np.array([axis]), True, 1e-5, eps_mode)
    scaled = op.add(op.multiply(normalised, op.constant(np.full((1, 2, 1), scale, np.float32))),
                    op.constant(np.zeros((1, 2, 1), np.float32)))  # fmt: skip
    return openvino.Model([op.reshape(scaled, np.array([2, 8, 5, 6]), special_zero=False)], [x], "norm")


@pytest.mark.parametrize(("scale", "count"), [(1.0, 1), (2.0, 0)])
def test_norms_by_channel_are_the_norms(scale: float, count: int) -> None:
    """And what is no plain GroupNorm stays as it is."""
    import openvino

    pixels = torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(0)) * 3 + 5
    model = norm_model(scale)
    assert normalise_by_channel(model) == count
    assert any(node.get_type_name() == "MVN" for node in model.get_ops()) is (count == 0)
    found = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(pixels.numpy())[0]
    expected = torch.nn.functional.group_norm(pixels, 2, eps=1e-5) * scale
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", [{"axis": 1}, {"eps_mode": "OUTSIDE_SQRT"}])
def test_other_norms_are_left_alone(other: dict[str, Any]) -> None:
    assert normalise_by_channel(norm_model(1.0, **other)) == 0


def test_the_decoders_norms_are_taken_by_channel(
    plain_model: PoseModel, openvino_networks: Path, tmp_path: Path
) -> None:
    engine = load(plain_model, openvino_networks, tmp_path)["vae_decoder"]
    left = [node for node in engine._read(engine.spec, ((1, 4, 16, 16),)).get_ops() if node.get_type_name() == "MVN"]
    assert len(left) == 1  # of the attention, whose tokens are no picture
