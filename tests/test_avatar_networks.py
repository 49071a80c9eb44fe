"""The networks of a folder in its own precision and in float32, one at a time."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.untrained import untrained_checkpoint
from posecrafter_rt.avatar_networks import Networks
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.engines import Precision, openvino_operations
from posecrafter_rt.engines.torch import TorchBackend
from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.runtime.memory import USED_SHARE
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.runtime.report import SegmentReport
from posecrafter_rt.spec import FEED_FORWARD_TOKENS, SHALLOW_STREAM, STREAM_NETWORKS


@pytest.fixture
def networks(tiny_base: Path, tmp_path: Path) -> Networks:
    untrained_checkpoint(str(tiny_base), num_frames=2).save(tmp_path / "tuned.ckpt")
    return Networks(build_engine(tmp_path / "tuned.ckpt", options=BuildOptions("torch", "fp16")).folder)


def test_one_precision_at_a_time_and_float32_is_that_of_the_stored_weights(networks: Networks) -> None:
    assert networks.built == "fp16" and not networks.engines
    networks.use("fp16")
    unet: Any = networks.engines["unet"]
    stored = {name: parameter.clone() for name, parameter in unet.module.named_parameters()}
    networks.use("fp16")
    assert networks.engines["unet"] is unet
    gone = weakref.ref(unet.module)
    del unet
    networks.use("fp32")
    assert gone() is None
    wide: Any = networks.engines["unet"]
    for name, parameter in wide.module.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, stored[name].float()), name
    networks.close()
    assert networks.precision is None and not networks.engines


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_a_render_that_has_come_to_float32_stays_there(networks: Networks, precision: Precision) -> None:
    adjustment = networks.widening("the inversion", 3, precision)
    assert adjustment["frame"] == 3 and adjustment["precision"] == "fp32"
    assert adjustment["reason"] == f"the inversion was not finite in {precision}"
    assert networks.needed(SegmentReport(), SegmentReport(adjustments=[adjustment])) == ("fp32", None)
    shortened = {"frame": 4, "segment": 2, "overlap": 0, "reason": "memory ran out"}
    assert networks.needed(SegmentReport(adjustments=[shortened])) == ("fp16", None)
    with pytest.raises(PoseCrafterError, match="the inversion is not finite in fp32"):
        networks.widening("the inversion", 3, "fp32")


def test_parts_become_smaller_until_they_are_few_tokens_and_are_what_is_loaded(
    networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The widest level of 32 × 32 pixels has 256 tokens a frame."""
    monkeypatch.setattr("posecrafter_rt.avatar_networks.LEAST_TOKENS", 512)
    report = SegmentReport()
    for expected in (1280, 640):
        adjustment = networks.dividing(10, networks.needed(report)[1], 4, "memory ran out")
        assert adjustment == {"frame": 4, "tokens_at_once": expected, "reason": "memory ran out"}
        report.adjust(adjustment)
    assert networks.needed(report) == ("fp16", 640)
    assert networks.dividing(10, 640, 4, "memory ran out") is None
    assert networks.dividing(1000, None, 4, "memory ran out")["tokens_at_once"] == FEED_FORWARD_TOKENS // 2
    networks.use(*networks.needed(report))
    unet: Any = networks.engines["unet"]
    told = [module.tokens_at_once for module in unet.module.modules() if hasattr(module, "tokens_at_once")]
    assert told and set(told) == {640}
    networks.use("fp16")
    unet = networks.engines["unet"]
    assert not any(hasattr(module, "tokens_at_once") for module in unet.module.modules())
    networks.folder.manifest["backend"] = "openvino"
    assert networks.dividing(1000, None, 4, "memory ran out") is None


def test_openvino_holds_more_than_its_files_and_a_lighter_engine_is_named(
    networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_stored = networks.room(RenderOptions())
    assert as_stored.lighter is None  # it is the lightest
    networks.folder.manifest.update(backend="openvino", precision="fp32")
    as_ordered = networks.room(RenderOptions())
    assert as_ordered.reserved == int(1.7 * as_stored.reserved)
    asked = list[None]()
    least = (1.1 * as_stored.reserved + 2 * as_stored.per_frame) / USED_SHARE  # for the faster one
    for share, missing, lighter in ((1.01, None, "openvino"), (0.99, None, "torch"), (1.01, "no compiler", "torch")):
        free = int(share * least)
        monkeypatch.setattr("posecrafter_rt.avatar_networks.free_bytes", lambda device_type, free=free: free)
        monkeypatch.setattr(
            openvino_operations, "missing_reason", lambda missing=missing: asked.append(None) or missing
        )
        found = networks.room(RenderOptions())
        assert not asked  # it compiles, which only a clip that hardly fits is worth
        assert found.lighter is not None and f"--backend {lighter} --precision fp16" in found.lighter()
        asked.clear()
    networks.folder.manifest["precision"] = "fp16"
    in_halves = networks.room(RenderOptions())
    assert in_halves.reserved == int(1.1 * as_stored.reserved)
    assert in_halves.lighter is not None and "--backend torch" in in_halves.lighter()
    networks.folder.manifest["precision"] = "int8"
    in_bytes = networks.room(RenderOptions())
    assert in_bytes.reserved == int(0.7 * as_stored.reserved) and in_bytes.lighter is None
    networks.folder.manifest["precision"] = "fp32"
    networks.has_run = True  # it holds them by now
    assert networks.room(RenderOptions()).reserved == as_stored.reserved


def test_on_a_gpu_loaded_networks_count_once_and_numbers_are_as_wide_as_the_precision(
    networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posecrafter_rt.avatar_networks.free_bytes", lambda device_type: 10**9)
    on_cpu = networks.room(RenderOptions())
    stored = sum(file.stat().st_size for file in networks.folder.networks.glob("*.safetensors"))
    assert on_cpu.free == 10**9 and on_cpu.reserved >= stored > 0
    assert not networks.engines
    networks.folder.manifest["device"] = {**networks.folder.manifest["device"], "type": "cuda"}
    on_gpu = networks.room(RenderOptions())
    assert networks.precision == "fp16" and on_gpu.reserved == 0
    assert on_cpu.per_frame // 2 < on_gpu.per_frame < 0.6 * on_cpu.per_frame  # pose embeddings stay as they are
    networks.use("fp32")
    assert networks.room(RenderOptions()).per_frame == on_cpu.per_frame
    assert networks.precision == "fp32"
    assert networks.room(RenderOptions(guidance_scale=3.0)).per_frame > 1.9 * on_cpu.per_frame


def test_plans_that_are_read_when_they_are_first_run_are_set_aside_until_then(
    networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posecrafter_rt.avatar_networks.free_bytes", lambda device_type: 10**9)
    networks.use("fp16")  # by torch: what counts are the files
    networks.folder.manifest["device"] = {**networks.folder.manifest["device"], "type": "cuda"}
    networks.folder.manifest["backend"] = "tensorrt"
    for name, size in (
        ("unet", 700),
        ("vae_decoder", 30),
        *((name, 5000) for name in (*STREAM_NETWORKS, SHALLOW_STREAM)),
    ):
        (networks.folder.networks / f"{name}.plan").write_bytes(bytes(size))
    assert list(networks.folder.networks.glob("*.safetensors"))  # which a refit reads, and no render
    assert networks.room(RenderOptions()).reserved == 730
    networks.has_run = True
    assert networks.room(RenderOptions()).reserved == 0


def test_networks_stay_on_the_gpu_that_was_current_when_they_were_first_loaded(
    networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever the program has made current since. No GPU is needed: torch is only asked to make one current."""
    asked, now = list[str](), iter(("cuda:1", "cuda:0"))

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        asked.append(f"on {device}")
        yield
        asked.append("done")

    def load(*arguments: Any) -> dict[str, Any]:
        asked.append("load")
        return {"unet": SimpleNamespace()}

    def free_bytes(device_type: str) -> int:
        asked.append("free")
        return 10**9

    monkeypatch.setattr("posecrafter_rt.avatar_networks.torch_device", lambda: torch.device(next(now)))
    monkeypatch.setattr("posecrafter_rt.avatar_networks.free_bytes", free_bytes)
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(TorchBackend, "load", load)
    networks.use("fp16")
    assert asked == ["load"] and networks.device is None  # a processor's engine, beside a GPU
    networks.close()
    asked.clear()
    networks.folder.manifest["device"] = {**networks.folder.manifest["device"], "type": "cuda"}
    networks.use("fp16")
    networks.room(RenderOptions())
    networks.release()
    networks.use("fp32")
    assert asked == [word for what in ("load", "free", "load") for word in ("on cuda:1", what, "done")]
    assert networks.device == torch.device("cuda:1")


def test_memory_that_networks_keep_for_their_activations_is_free_for_the_next_render(
    networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posecrafter_rt.avatar_networks.free_bytes", lambda device_type: 10**9)
    networks.use("fp16")
    sampling, decoding = (torch.empty(size, dtype=torch.uint8) for size in (700, 30))
    for name, memory in (("unet", sampling), ("controlnet", sampling), ("vae_decoder", decoding)):
        monkeypatch.setattr(networks.engines[name], "activations", memory, raising=False)
    assert networks.room(RenderOptions()).free == 10**9 + 730
    monkeypatch.setattr("posecrafter_rt.avatar_networks.free_bytes", lambda device_type: None)
    assert networks.room(RenderOptions()).free is None


def test_threads_count_where_rounding_depends_on_them(networks: Networks) -> None:
    manifest = networks.folder.manifest
    for backend, device, expected in (
        ("torch", "cpu", [torch.get_num_threads()]),
        ("torch", "cuda", []),
        ("openvino", "cpu", []),
    ):
        manifest.update(backend=backend, device={**manifest["device"], "type": device})
        assert networks.threads == expected


@pytest.mark.parametrize(("change", "missing", "hint"), [
    ({"decoder": "small"}, "no small decoder", "--small-decoder"), ({"unet_every": 2}, "feature reuse", "build-engine")])  # fmt: skip
def test_options_that_need_what_the_engine_has_not_are_refused(
    networks: Networks, change: dict[str, Any], missing: str, hint: str
) -> None:
    networks.folder.manifest["architecture"]["has_small_decoder"] = False
    networks.folder.manifest["feature_reuse"] = False
    networks.check(RenderOptions())
    with pytest.raises(PoseCrafterError, match=missing) as caught:
        networks.check(RenderOptions(**change))
    assert caught.value.hint is not None and hint in caught.value.hint and "--no-" not in caught.value.hint
