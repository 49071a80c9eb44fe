"""The TensorRT backend: what it decides without a GPU, and everything for real where one answers (`pytest -m gpu`)."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from posecrafter_rt.blob_cache import BlobCache
from posecrafter_rt.engines import choose_backend, choose_precision
from posecrafter_rt.engines import tensorrt as backend_module
from posecrafter_rt.engines import tensorrt_runtime as runtime_module
from posecrafter_rt.engines.base import Precision
from posecrafter_rt.engines.manifest import write_manifest
from posecrafter_rt.engines.openvino import OpenVinoBackend
from posecrafter_rt.engines.tensorrt import (
    DECODERS,
    TensorRTBackend,
    _build_network,
    _deserialize,
    check_description,
    initialisers,
    plan_precision,
)
from posecrafter_rt.engines.tensorrt_build import profile_sizes
from posecrafter_rt.engines.tensorrt_plugins import register_plugins
from posecrafter_rt.engines.tensorrt_runtime import (
    ALIGNMENT,
    COPIED_BYTES,
    TensorRTEngine,
    Workspace,
    is_copied,
    output_shapes,
)
from posecrafter_rt.errors import BackendUnavailable, EngineFolderError, ShapeError
from posecrafter_rt.export.graphs import graph_key
from posecrafter_rt.export.onnx import export_network
from posecrafter_rt.export.shapes import random_inputs
from posecrafter_rt.export.verify import relative_error
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.ops.keyframe_attention import keyframe_attention
from posecrafter_rt.ops.temporal_attention import temporal_attention
from posecrafter_rt.runtime.ahead import Ahead, Sampled
from posecrafter_rt.runtime.progress import OnStep, ignore
from posecrafter_rt.runtime.report import SegmentReport
from posecrafter_rt.spec import Architecture, NetworkSpec, TensorSpec, network_specs
from posecrafter_rt.tensor_file import save_tensors
from tests.tiny import NETWORKS

REASON = TensorRTBackend().unsupported_reason("fp16")
on_gpu = [pytest.mark.gpu, pytest.mark.tensorrt, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

ARCH = Architecture(
    latent_channels=4, vae_scale_factor=8, text_tokens=77, text_channels=768, pose_channels=320,
    time_widths=(10, 20), kv_widths=(30, 40), residuals=((320, 1), (640, 2), (1280, 8)), mid_residual=(1280, 8),
    keyframe_layers=(((320, 1), (640, 2)), ((320, 1),)), temporal_layers=((320, 1),),
)  # fmt: skip


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorrt" else find(name))


def test_without_it_one_line_says_what_to_install(nothing_installed: None) -> None:
    with pytest.raises(BackendUnavailable, match=r"tensorrt is not installed: pip install 'tensorrt-cu13>=11.4'$"):
        choose_backend("tensorrt", "fp16")
    backend, why = choose_backend("auto", "fp32")
    assert backend.name != "tensorrt" and why.startswith("tensorrt: tensorrt is not installed")
    assert choose_precision("auto", "auto") == choose_precision("auto")


def test_where_it_can_run_it_is_the_first_choice_and_no_more_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has timed it."""
    monkeypatch.setattr(TensorRTBackend, "unsupported_reason", lambda self, precision: None)
    backend, why = choose_backend("auto", "fp16")
    assert backend.name == "tensorrt" and why == "the first choice here"


def test_cuda_is_not_asked_where_nothing_is_installed(nothing_installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> bool:
        raise AssertionError("CUDA was asked")

    monkeypatch.setattr(torch.cuda, "is_available", asked)
    assert TensorRTBackend().unsupported_reason("fp16")


def test_what_no_installation_mends_is_said_first(nothing_installed: None) -> None:
    assert TensorRTBackend().unsupported_reason("int8") == "it has no int8; use fp32, bf16 or fp16"


@pytest.mark.parametrize(("driver", "wheels", "is_refused"), [
    ("12.8", {"tensorrt-cu13": "11.4.0"}, True), ("13.0", {"tensorrt-cu13": "11.4.0"}, False),
    ("13.2", {"tensorrt-cu13": "11.4.0"}, False), ("12.8", {}, False),  # another wheel
])  # fmt: skip
def test_a_driver_that_torch_can_use_may_be_too_old_for_tensorrt(
    monkeypatch: pytest.MonkeyPatch, driver: str, wheels: dict[str, str], is_refused: bool
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(backend_module, "library_versions", lambda names: wheels)
    monkeypatch.setattr(backend_module, "cuda_driver", lambda: driver)
    monkeypatch.setattr(backend_module, "_version", lambda: "11.4.0")
    reason = "the driver is for CUDA 12.8; tensorrt-cu13 needs 13.0 (driver 580)" if is_refused else None
    assert TensorRTBackend().unsupported_reason("fp16") == reason


def test_only_what_16_bits_do_not_hold_is_kept_from_them() -> None:
    assert plan_precision("unet", "fp16") == ("fp16", False)
    assert plan_precision("time_tables", "bf16") == ("fp32", False)
    assert plan_precision("vae_decoder", "fp16") == ("fp32", True)  # float32's range, float16's mantissa
    assert plan_precision("vae_decoder", "bf16") == ("bf16", True)  # of which a transposed convolution is in float32
    assert plan_precision("unet", "fp32") == ("fp32", False)


def test_outputs_follow_the_inputs() -> None:
    spec = network_specs(ARCH)["controlnet"]
    shapes = tuple(tuple(tensor.shape) for tensor in random_inputs(spec, SIZES).values())
    assert output_shapes(spec, shapes) == (
        (3, 320, 16, 8), (3, 640, 8, 4), (3, 1280, 2, 1), (3, 1280, 2, 1))  # fmt: skip


SIZES = {"frames": 3, "groups": 1, "steps": 2, "window": 3, "height": 128, "width": 64}


def test_only_small_or_unaligned_inputs_are_copied() -> None:
    memory = torch.zeros(COPIED_BYTES // 2)
    start = -memory.data_ptr() % ALIGNMENT // 4
    aligned, size = memory[start:], COPIED_BYTES // 4
    assert is_copied(aligned[:size]) and not is_copied(aligned[: size + 1])
    assert is_copied(aligned[1 : size + 2])


def test_what_a_build_has_to_trace_and_to_time_is_counted(
    plain_model: PoseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSECRAFTER_CACHE", str(tmp_path))
    monkeypatch.setattr(backend_module, "gpu_name", lambda: "A (8.6)")
    monkeypatch.setattr(backend_module, "_version", lambda: "11.4.0")
    model, arch, backend = plain_model, plain_model.architecture(), TensorRTBackend()
    networks = model.networks()
    assert backend.num_missing(model, arch, "fp16") == len(networks) + 1
    key = graph_key(networks["unet"], network_specs(arch)["unet"], arch)
    BlobCache(tmp_path / "graphs").save(key, b"a graph, which is not read")
    assert backend.num_missing(model, arch, "fp16") == len(networks)
    assert OpenVinoBackend().num_missing(model, arch, "fp32") == len(networks) - 1
    BlobCache(tmp_path / "tensorrt").save({"timings": "A (8.6)", "tensorrt": "11.4.0"}, b"")
    assert backend.num_missing(model, arch, "fp16") == len(networks) - 1


def test_another_gpu_or_version_is_refused(tmp_path: Path) -> None:
    networks = tmp_path / "networks"
    networks.mkdir()
    write_manifest(tmp_path, {"backend": "tensorrt", "precision": "fp16", "max_frames": 20})
    options = "--backend tensorrt --precision fp16 --max-frames 20 --force"
    hint = f"build it again: posecrafter-rt build-engine tuned.ckpt -o {tmp_path} {options}"
    with pytest.raises(EngineFolderError, match="holds no networks") as caught:
        check_description(networks, {})
    assert caught.value.hint == hint
    (networks / backend_module.DESCRIPTION).write_text(json.dumps({"tensorrt": "11.4.0", "device": "A (8.6)"}))
    check_description(networks, {"tensorrt": "11.4.0", "device": "A (8.6)"})
    with pytest.raises(EngineFolderError, match=r"built for device A \(8.6\), this is B \(9.0\)") as caught:
        check_description(networks, {"tensorrt": "11.4.0", "device": "B (9.0)"})
    assert caught.value.hint == hint


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.INT64])
def test_weights_are_kept_in_their_own_type(dtype: ir.DataType) -> None:
    import numpy as np

    array = np.arange(6).reshape(2, 3).astype(dtype.numpy())
    array.setflags(write=False)  # as what was read from a file
    value = ir.Value(name="w", const_value=ir.Tensor(array, dtype=dtype, name="w"))
    value.dtype, value.shape = dtype, ir.Shape((2, 3))
    kept = initialisers(
        ir.Model(ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 20}), ir_version=10)
    )
    assert kept["w"].float().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert kept["w"].element_size() == dtype.itemsize and kept["w"].is_floating_point() == (dtype != ir.DataType.INT64)
    kept["w"].zero_()
    assert array.astype(float).sum() == 15  # it has memory of its own


# ---- with a stand-in for the GPU ----


def test_a_plan_is_read_and_refitted_on_its_device_once_torch_keeps_no_memory_that_is_free(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    did: list[str] = []

    @contextmanager
    def device(current: torch.device) -> Iterator[None]:
        did.append(f"on {current}")
        yield
        did.append("back")

    def plan() -> Any:
        did.append("read")
        return object()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: did.append("emptied"))
    monkeypatch.setattr(runtime_module, "refit", lambda *arguments: did.append("refitted"))
    workspace: Any = SimpleNamespace(
        device=torch.device("cuda", 1), stream=SimpleNamespace(synchronize=lambda: did.append("waited"))
    )
    weights = tmp_path / "unet.safetensors"
    save_tensors({"unet.w": torch.zeros(2)}, weights)
    engine = TensorRTEngine(network_specs(ARCH)["unet"], plan, workspace, weights)
    assert not did  # nothing is read before it is needed
    for _ in range(2):
        assert engine.swap_weights({"unet.w": torch.ones(2), "unet.other": torch.ones(2)}) == {"unet.w"}
    assert did == ["on cuda:1", "waited", "emptied", "read", "refitted", "back",
                   "on cuda:1", "waited", "refitted", "back"]  # fmt: skip


class Stays(Tensor):
    """A tensor that is on every device."""

    def to(self, *arguments: Any, **options: Any) -> Any:
        return self


@pytest.mark.parametrize(("name", "precision", "names_bf16"), [
    ("unet", "fp16", True), ("unet", "bf16", False), ("unet", "fp32", False),
    ("vae_decoder", "fp16", False),  # whose products are in float32
])  # fmt: skip
def test_a_plan_that_misses_its_limit_in_fp16_names_bf16(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, precision: Precision, names_bf16: bool
) -> None:
    """Its products may have been added up in float16."""
    spec = NetworkSpec(name, (TensorSpec("x", ("frames",)),), (TensorSpec("y", ("frames",)),))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backend_module, "Workspace", lambda device: None)
    monkeypatch.setattr(backend_module, "TensorRTEngine", lambda *arguments: lambda x: {"y": 2 * x})
    monkeypatch.setattr(backend_module, "random_inputs", lambda spec, sizes: {"x": torch.ones(2).as_subclass(Stays)})
    network, message = nn.Module(), f"^TensorRT's {name} gives y with a relative error of 1$"
    network.forward = lambda x: (x,)
    for hints in (backend_module.IF_BUILT, backend_module.IF_REFITTED):
        with pytest.raises(EngineFolderError, match=message) as raised:
            TensorRTBackend()._compare(tmp_path, network, spec, ARCH, precision, hints)
        assert raised.value.hint and ("--precision bf16" in raised.value.hint) == names_bf16


# ---- on a GPU, with the library ----


@pytest.fixture(scope="module")
def engines_of(
    plain_model: PoseModel, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Precision], dict[str, Any]]:
    """Builds and loads an engine in a precision, once each, for the tests' 16 frames at most."""
    built: dict[str, dict[str, Any]] = {}

    def engines(precision: Precision) -> dict[str, Any]:
        if precision not in built:
            folder, arch = tmp_path_factory.mktemp(precision), replace(plain_model.architecture(), max_frames=16)
            backend = TensorRTBackend()
            backend.build(plain_model, arch, folder, precision, lambda stage: None)
            reserved = torch.cuda.memory_reserved()
            torch.cuda.empty_cache()
            assert torch.cuda.memory_reserved() == reserved  # what checks took is TensorRT's again
            assert not list(folder.glob("*.onnx*")) and (folder / "timing.cache").stat().st_size > 0
            built[precision] = backend.load(folder, arch, precision, folder / "unused")
        return built[precision]

    return engines


class OneAttention(nn.Module):
    """One of the two attentions alone, behind the projection of q, which tells how wide it is."""

    def __init__(self, attention: Callable[..., Tensor], channels: int) -> None:
        super().__init__()
        self.attention, self.to_q = attention, nn.Linear(channels, channels, bias=False)

    def forward(self, hidden_states: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        return (self.attention(self.to_q(hidden_states), k, v, 8),)


class TwoAttentions(nn.Module):
    """Attentions of two head sizes: one plan then has two kernels that are compiled from one source."""

    def __init__(self, attention: Callable[..., Tensor], channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.narrow, self.wide = OneAttention(attention, channels // 2), OneAttention(attention, channels)

    def forward(self, hidden_states: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        narrow = self.narrow(*(tensor[..., : self.channels // 2] for tensor in (hidden_states, k, v)))
        return (torch.cat((*narrow, *self.wide(hidden_states, k, v)), dim=-1),)


def attention_spec(is_temporal: bool, channels: int, out_channels: int) -> NetworkSpec:
    each = ("frames", 64)
    q = ("groups", *each) if is_temporal else each
    kv = q if is_temporal else ("groups", 64)
    inputs = [TensorSpec(name, (*dims, channels)) for name, dims in (("hidden_states", q), ("k", kv), ("v", kv))]
    return NetworkSpec("attention", tuple(inputs), (TensorSpec("out", (*q, out_channels)),))


def assert_plan_is_module(module: nn.Module, spec: NetworkSpec, folder: Path, tolerance: float) -> None:
    engine = TensorRTEngine(spec, partial(_deserialize, folder, spec.name, ""), Workspace(torch.device("cuda", 0)),
                            folder / f"{spec.name}.safetensors")  # fmt: skip
    for frames in (1, 7, 16, 1):
        inputs = random_inputs(spec, {**SIZES, "frames": frames})
        with torch.no_grad():
            right = module(*inputs.values())[0]
        outputs = engine(**{name: tensor.cuda() for name, tensor in inputs.items()})
        assert relative_error(first(outputs), right) < tolerance


def draw(model: PoseModel, name: str, frames: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs on the GPU, of so many frames, or of as many as the network may be given."""
    arch = model.architecture()
    frames = min(frames, profile_sizes(network_specs(arch)[name], arch)[2]["frames"])
    sizes = {"frames": frames, "groups": 1, "steps": frames, "window": 3, "height": 32, "width": 48}
    inputs = random_inputs(network_specs(arch)[name], sizes, seed=seed)
    return {key: tensor.cuda() for key, tensor in inputs.items()}


def expected(model: PoseModel, name: str, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.networks()[name](*(tensor.cpu() for tensor in inputs.values()))[0]


def first(outputs: dict[str, Tensor]) -> Tensor:
    return next(iter(outputs.values())).cpu()


class TestOnGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("precision", ["fp16", "fp32"])
    @pytest.mark.parametrize("channels", [320, 640, 1280])
    @pytest.mark.parametrize("attention", [keyframe_attention, temporal_attention])
    def test_each_plugin_is_its_reference(
        self,
        plain_model: PoseModel,
        tmp_path: Path,
        attention: Callable[..., Tensor],
        channels: int,
        precision: Precision,
    ) -> None:
        """The least that shows whether TensorRT takes a kernel of ours: a network of one node, as wide as Stable Diffusion's."""
        is_temporal = attention is temporal_attention
        spec = attention_spec(is_temporal, channels, channels)
        arch, module = replace(plain_model.architecture(), max_frames=16), OneAttention(attention, channels).eval()
        register_plugins(torch.cuda.get_device_capability())
        described, _ = _build_network(export_network(module, spec, arch), spec, arch, tmp_path, precision, b"", print)
        has_kernel = is_temporal or (precision, channels) != ("fp32", 1280)
        assert (described["plugins"], described["attentions"]) == (int(has_kernel), 1)
        assert_plan_is_module(module, spec, tmp_path, 1e-4 if precision == "fp32" else 5e-3)

    @pytest.mark.parametrize("attention", [keyframe_attention, temporal_attention])
    def test_two_plugins_of_one_kernel_do_not_mix(
        self, plain_model: PoseModel, tmp_path: Path, attention: Callable[..., Tensor]
    ) -> None:
        """TensorRT tells kernels apart by their names."""
        spec = attention_spec(attention is temporal_attention, 640, 320 + 640)
        arch, module = replace(plain_model.architecture(), max_frames=16), TwoAttentions(attention, 640).eval()
        register_plugins(torch.cuda.get_device_capability())
        described, _ = _build_network(export_network(module, spec, arch), spec, arch, tmp_path, "fp16", b"", print)
        assert (described["plugins"], described["attentions"]) == (2, 2)
        assert_plan_is_module(module, spec, tmp_path, 5e-3)

    @pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", 5e-3), ("bf16", 0.03)])
    @pytest.mark.parametrize("name", NETWORKS)
    def test_every_network_equals_its_module(
        self, plain_model: PoseModel, engines_of: Callable[[Precision], dict[str, Any]], name: str,
        precision: Precision, tolerance: float,
    ) -> None:  # fmt: skip
        engine = engines_of(precision)[name]
        for frames in (1, 16, 1, 7):
            inputs = draw(plain_model, name, frames)
            assert relative_error(first(engine(**inputs)), expected(plain_model, name, inputs)) < tolerance

    def test_a_recorded_run_is_the_same_run(
        self, plain_model: PoseModel, engines_of: Callable[[Precision], dict[str, Any]]
    ) -> None:
        engine = engines_of("fp16")["unet"]
        inputs = draw(plain_model, "unet", 5)
        results = [first(engine(**inputs)) for _ in range(3)]
        slot = next(reversed(engine._slots.values()))
        assert slot.records and any(graph is not None for graph in slot.graphs.values())
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        inputs["latents"].neg_()
        changed = first(engine(**inputs))
        assert relative_error(changed, expected(plain_model, "unet", inputs)) < 5e-3

    def test_networks_share_a_workspace_and_decoders_have_their_own(
        self, engines_of: Callable[[Precision], dict[str, Any]]
    ) -> None:
        names: dict[int, set[str]] = {}
        for name, engine in engines_of("fp16").items():
            names.setdefault(id(engine._workspace), set()).add(name)
        decoders = {*DECODERS} & {*engines_of("fp16")}
        assert sorted(names.values(), key=len) == [decoders, {*engines_of("fp16")} - decoders]

    def test_one_thread_decodes_while_another_samples(
        self, plain_model: PoseModel, engines_of: Callable[[Precision], dict[str, Any]]
    ) -> None:
        """Graphs are recorded on both sides meanwhile, contexts made, and the workspaces grow: the results are those of one
        after the other.
        """
        unet, decoder = (engines_of("fp16")[name] for name in ("unet", "vae_decoder"))
        for engine in (unet, decoder):
            engine._slots.clear()  # whatever other tests have run
        noisy = [draw(plain_model, "unet", frames, seed) for frames in (9, 11) for seed in range(6)]
        clean = [draw(plain_model, "vae_decoder", 1, seed) for seed in range(40)]

        def sample(told: OnStep) -> Sampled:
            return torch.cat([unet(**inputs)["noise_pred"].clone() for inputs in noisy]), SegmentReport()

        with closing(Ahead(decoder.device)) as ahead:
            ahead.start(sample)
            pictures = [first(decoder(**inputs)) for inputs in clean]
            sampled = ahead.take(ignore)
        assert sampled is not None
        assert torch.equal(sampled[0], sample(ignore)[0])
        for inputs, picture in zip(clean, pictures, strict=True):
            assert torch.equal(first(decoder(**inputs)), picture)
        for engine in (unet, decoder):
            assert all(slot.records for slot in engine._slots.values())  # nothing has broken a recording

    def test_inputs_may_lie_on_the_cpu_and_what_is_kept_has_the_engine_s_type(
        self, plain_model: PoseModel, engines_of: Callable[[Precision], dict[str, Any]]
    ) -> None:
        inputs = {key: tensor.cpu() for key, tensor in draw(plain_model, "controlnet", 2).items()}
        outputs = engines_of("fp16")["controlnet"](**inputs)
        assert all(tensor.is_cuda and tensor.dtype == torch.float16 for tensor in outputs.values())  # all are kept
        assert relative_error(first(outputs), expected(plain_model, "controlnet", inputs)) < 5e-3

    def test_more_frames_than_were_built_for_are_refused(
        self, plain_model: PoseModel, engines_of: Callable[[Precision], dict[str, Any]]
    ) -> None:
        with pytest.raises(ShapeError, match="outside what the engine was built for") as caught:
            engines_of("fp16")["unet"](**draw(plain_model, "unet", 40))
        assert str(caught.value.hint).startswith("change --max-frames or --size and build it again: posecrafter-rt ")

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_refitted_weights_are_all_used(
        self, make_tiny_model: Callable[..., PoseModel], tmp_path: Path, precision: Precision
    ) -> None:
        """Biases included: TensorRT 11.3.0 is known to have lost one."""
        model = make_tiny_model()
        model.fold()
        backend, arch = TensorRTBackend(), replace(model.architecture(), max_frames=8)
        backend.build(model, arch, tmp_path, precision, lambda stage: None)
        engine = backend.load(tmp_path, arch, precision, tmp_path)["unet"]
        generator = torch.Generator().manual_seed(3)
        tensors = {}
        for name, parameter in model.unet.named_parameters():
            if ".attn2.to_k." not in name and ".attn2.to_v." not in name and "time_emb" not in name:
                parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
                tensors[f"unet.{name}"] = parameter.detach().clone()
        assert engine.swap_weights(tensors)
        inputs = draw(model, "unet", 3)
        tolerance = 1e-4 if precision == "fp32" else 5e-3
        assert relative_error(first(engine(**inputs)), expected(model, "unet", inputs)) < tolerance
