"""Renders that have to change on the way: shorter segments where memory runs out, a wider type where 16 bits do not do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.runs import moving_person
from bench.untrained import untrained_checkpoint
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.engines import Engine
from posecrafter_rt.engines.manifest import write_manifest
from posecrafter_rt.engines.openvino_operations import missing_bytes_reason
from posecrafter_rt.engines.torch import TorchEngine
from posecrafter_rt.errors import OutOfMemory, PoseCrafterError
from posecrafter_rt.rendering import render_to_files
from posecrafter_rt.runtime.cache import InversionCache, inversion_key
from posecrafter_rt.runtime.options import RenderOptions
from tests.tiny import break_off

POSES = moving_person(13, (32, 32))
CHANGES: dict[str, Any] = {"num_inference_steps": 2, "strength": 1.0, "inversion_substeps": 1, "overlap": 2}


@pytest.fixture(scope="module")
def engine(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adjusting")
    untrained_checkpoint(str(tiny_base), num_frames=3).save(folder / "tuned.ckpt")
    build_engine(folder / "tuned.ckpt", folder / "tuned.engine", BuildOptions("torch", "fp32"))
    return folder / "tuned.engine"


@pytest.fixture
def avatar(engine: Path):
    with Avatar.load(engine) as avatar:
        yield avatar


def run_out() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)  # more than any address space holds


@pytest.fixture
def starve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """starve(network, runs_out): calls of the network run out of memory where runs_out(call from 0, frames) says so."""
    original = TorchEngine.__call__

    def starve(network: str, runs_out: Callable[[int, int], bool]) -> None:
        calls: list[int] = []

        def starved(engine: TorchEngine, **inputs: Tensor) -> dict[str, Tensor]:
            if engine.spec.name == network:
                calls.append(1)
                if runs_out(len(calls) - 1, len(inputs["latents"])):
                    run_out()
            return original(engine, **inputs)

        monkeypatch.setattr(TorchEngine, "__call__", starved)

    return starve


def report_of(avatar: Avatar) -> dict[str, Any]:
    assert avatar.last_report is not None
    return avatar.last_report.to_json()


def test_a_joint_render_that_does_not_fit_goes_on_in_segments(avatar: Avatar, starve: Callable[..., None]) -> None:
    in_segments = avatar.render(POSES, segment=6, **CHANGES)
    assert report_of(avatar)["claims_byte_equality"] and not report_of(avatar)["adjustments"]
    starve("unet", lambda call, frames: frames > 7)  # the reference and six
    assert np.array_equal(avatar.render(POSES, **CHANGES), in_segments)
    report = report_of(avatar)
    (adjustment,) = report["adjustments"]
    assert adjustment["reason"].startswith("memory ran out: ")
    assert (adjustment["frame"], adjustment["segment"], adjustment["overlap"]) == (0, 6, 2)
    assert report["segments"] == [6, 6, 6] and report["num_segments"] == 3
    assert report["approximations"]["segment"] == 6 and not report["claims_byte_equality"]
    assert report["edited_regions"] + len(report["skipped_regions"]) == 3 * len(POSES)  # failed attempts do not count


def test_what_is_settled_stays_and_the_rest_of_the_clip_becomes_shorter(
    avatar: Avatar, starve: Callable[..., None]
) -> None:
    """Of 13 frames in segments of 6 the first settles 3; 10 are left, in segments of 3 that share 1: 3 to 5, 5 to 7, ..."""
    whole = avatar.render(POSES, segment=6, **CHANGES)
    first = next(avatar.iter_segments(POSES, segment=6, **CHANGES))
    list(first.frames)
    calls_before = 2 + 2  # two steps of the inversion are cached; of the first segment two
    starve("unet", lambda call, frames: call >= calls_before - 2 and frames > 4)
    rendered = avatar.render(POSES, segment=6, **CHANGES)
    report = report_of(avatar)
    assert report["segments"] == [6, 3, 3, 3, 3, 2] and report["num_segments"] == 6
    assert np.array_equal(rendered[:3], whole[:3])
    # As if a run had been broken off after the first segment and gone on in segments of 3.
    follower = avatar.iter_segments(POSES, segment=6, finished=[first.report], carried=first.carried, **CHANGES)
    assert np.array_equal(rendered[3:], np.stack([frame for segment in follower for frame in segment.frames]))


@pytest.mark.parametrize("moment", [0, 5])
def test_one_failure_costs_no_more_than_the_length(avatar: Avatar, starve: Callable[..., None], moment: int) -> None:
    """The call that fails is of the first segment, or of the third: its networks are loaded anew, and it goes on."""
    avatar.render(POSES, segment=6, **CHANGES)
    before = avatar.engines["unet"]
    starve("unet", lambda call, frames: call == moment)
    frames = avatar.render(POSES, segment=6, **CHANGES)
    assert frames.shape == (13, 32, 32, 3) and avatar.engines["unet"] is not before
    assert [adjustment["segment"] for adjustment in report_of(avatar)["adjustments"]] == [3]


def test_decoding_that_runs_out_once_loses_no_frame(avatar: Avatar, starve: Callable[..., None]) -> None:
    """In the last segment nothing is left that could be shorter: the bytes are those of an unbroken run."""
    whole = avatar.render(POSES, segment=6, **CHANGES)
    starve("vae_decoder", lambda call, frames: call == 12)
    assert np.array_equal(avatar.render(POSES, segment=6, **CHANGES), whole)
    assert report_of(avatar)["claims_byte_equality"] and not report_of(avatar)["adjustments"]
    starve("vae_decoder", lambda call, frames: call == 2)
    assert np.array_equal(avatar.render(POSES, segment=6, **CHANGES)[:3], whole[:3])
    report = report_of(avatar)
    assert report["segments"] == [6, 3, 3, 3, 3, 2] and not report["claims_byte_equality"]
    assert [adjustment["frame"] for adjustment in report["adjustments"]] == [3]


@pytest.mark.parametrize(("network", "changes"), [
    ("unet", {}), ("vae_decoder", {}), ("unet", {"mode": "+selection"}), ("vae_decoder", {"mode": "controlvideo"})])  # fmt: skip
def test_where_nothing_helps_the_failure_is_clear_and_the_avatar_stays_of_use(
    avatar: Avatar, starve: Callable[..., None], network: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = avatar.render(POSES, **CHANGES, **changes)
    with monkeypatch.context():
        starve(network, lambda call, frames: True)
        with pytest.raises(OutOfMemory, match="memory ran out") as caught:
            avatar.render(POSES, **CHANGES, **changes)
    assert caught.value.hint
    monkeypatch.undo()
    assert np.array_equal(avatar.render(POSES, **CHANGES, **changes), whole)


def test_a_resumed_render_keeps_to_the_shorter_segments(
    avatar: Avatar, starve: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off after memory ran out, and gone on with when there is enough: the video is that of one run without."""
    options = RenderOptions(**CHANGES, segment=6)
    avatar.render(POSES, options)  # so that the inversion is cached
    starve("unet", lambda call, frames: call >= 2 and frames > 4)
    whole = render_to_files(avatar, POSES, tmp_path / "whole.mp4", options)
    starve("unet", lambda call, frames: call >= 2 and frames > 4)
    break_off(avatar, POSES, tmp_path / "broken.mp4", options, after=3)
    starve("unet", lambda call, frames: False)
    resumed = render_to_files(avatar, POSES, tmp_path / "broken.mp4", options)
    assert resumed["num_resumed"] == 3
    for name in ("segments", "adjustments", "claims_byte_equality", "approximations", "edited_regions"):
        assert resumed[name] == whole[name], name
    assert resumed["segments"] == [6, 3, 3, 3, 3, 2]
    assert (tmp_path / "broken.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def overflowing(tiny_base: Path, scale: float) -> Checkpoint:
    """A checkpoint that gives a residual stream of about `scale`; the norms after it take it back to 1."""
    checkpoint = untrained_checkpoint(str(tiny_base), num_frames=3)
    name, generator = (
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
        torch.Generator().manual_seed(0),
    )
    tensors = {f"{name}.weight": torch.randn(32, 32, generator=generator) * scale / 6,
               f"{name}.bias": torch.full((32,), scale)}  # fmt: skip
    return replace(checkpoint, tensors={**checkpoint.tensors, **tensors})


@pytest.fixture(scope="module")
def narrow(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine in fp16, and one in fp32 beside it, of weights that float16 holds, with activations that it does not."""
    folder = tmp_path_factory.mktemp("narrow")
    overflowing(tiny_base, 60_000.0).save(folder / "tuned.ckpt")
    for precision in ("fp16", "fp32"):
        build_engine(folder / "tuned.ckpt", folder / f"{precision}.engine", BuildOptions("torch", precision))
    return folder


@pytest.fixture
def fp16_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp16 itself, as on a GPU; a processor would widen the weights, and nothing would overflow."""
    monkeypatch.setattr("posecrafter_rt.engines.torch.multiplies", lambda precision, device: True)


def forget_inversions(avatar: Avatar) -> None:
    for file in avatar.folder.inversions.glob("*"):
        file.unlink()


@pytest.mark.usefixtures("fp16_runs")
def test_an_inversion_that_float16_does_not_hold_is_done_in_float32_and_so_is_all_that_follows(narrow: Path) -> None:
    with Avatar.load(narrow / "fp32.engine") as wide:
        expected = wide.render(POSES, **CHANGES)
        assert not report_of(wide)["adjustments"]
    with Avatar.load(narrow / "fp16.engine") as avatar:
        frames = avatar.render(POSES, **CHANGES)
        (adjustment,) = report_of(avatar)["adjustments"]
        assert adjustment == {"frame": 0, "precision": "fp32", "inversion": True,
                              "reason": "the inversion was not finite in fp16"}  # fmt: skip
        assert report_of(avatar)["claims_byte_equality"] and not report_of(avatar)["inversion_cached"]
        assert abs(frames.astype(int) - expected).mean() < 1  # the stored weights are rounded to float16
        again = avatar.render(POSES, **CHANGES)
        assert report_of(avatar)["inversion_cached"] and report_of(avatar)["adjustments"] == [adjustment]
        assert np.array_equal(again, frames)


@pytest.mark.usefixtures("fp16_runs")
def test_a_segment_that_float16_does_not_hold_is_done_once_more(
    narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inversion is given, as if it had been finite; then the first segment is done twice and the others once."""
    options, seen = RenderOptions(**CHANGES, segment=6), list[tuple[torch.dtype, int]]()
    original = TorchEngine.__call__

    def watched(engine: TorchEngine, **inputs: Tensor) -> dict[str, Tensor]:
        if engine.spec.name == "unet":
            seen.append((engine.dtype, len(inputs["latents"])))
        return original(engine, **inputs)

    with Avatar.load(narrow / "fp32.engine") as wide:
        forget_inversions(wide)
        wide.render(POSES, options)
        (file,) = wide.folder.inversions.iterdir()
        inverted = load_file(file)["inverted_latents"]
        reference = report_of(wide)["reference_index"]
    monkeypatch.setattr(TorchEngine, "__call__", watched)
    with Avatar.load(narrow / "fp16.engine") as avatar:
        forget_inversions(avatar)
        key = inversion_key(avatar.folder.manifest, avatar.schedules["ddim"], avatar.resolve(options), frame=reference,
                            prompt=avatar.prompt, precision="fp16", threads=avatar.networks.threads)  # fmt: skip
        InversionCache(avatar.folder.inversions).save(key, inverted)
        whole = render_to_files(avatar, POSES, tmp_path / "whole.mp4", options)
        (adjustment,) = whole["adjustments"]
        last = whole["segments"][0] - 1
        reason = f"the segment of frames 0 to {last} was not finite in fp16"
        assert adjustment == {"frame": 0, "precision": "fp32", "reason": reason}
        lengths = [(torch.float16, whole["segments"][0]), *((torch.float32, length) for length in whole["segments"])]
        assert seen == [(dtype, 1 + length) for dtype, length in lengths for _ in range(2)]
        # Broken off after the first segment, and gone on with by an avatar that is loaded anew: in float32 from the start.
        break_off(avatar, POSES, tmp_path / "broken.mp4", options, after=1)
    seen.clear()
    with Avatar.load(narrow / "fp16.engine") as avatar:
        resumed = render_to_files(avatar, POSES, tmp_path / "broken.mp4", options)
    assert resumed["num_resumed"] == 1 and resumed["adjustments"] == whole["adjustments"]
    assert {dtype for dtype, _ in seen} == {torch.float32}
    assert (tmp_path / "broken.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_what_no_type_holds_is_a_clear_failure(tiny_base: Path, tmp_path: Path) -> None:
    overflowing(tiny_base, 1e37).save(tmp_path / "tuned.ckpt")
    build_engine(tmp_path / "tuned.ckpt", tmp_path / "tuned.engine", BuildOptions("torch", "fp32"))
    with Avatar.load(tmp_path / "tuned.engine") as avatar:
        with pytest.raises(PoseCrafterError, match="the inversion is not finite in fp32") as caught:
            avatar.render(POSES, **CHANGES)
        assert caught.value.hint and not list(avatar.folder.inversions.glob("*"))


@pytest.mark.usefixtures("fp16_runs")
def test_a_backend_that_has_code_for_one_type_only_says_how_to_build_for_the_wider(
    narrow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posecrafter_rt.avatar_networks.LOADED_WIDER", ())
    with Avatar.load(narrow / "fp16.engine") as avatar:
        forget_inversions(avatar)
        with pytest.raises(PoseCrafterError, match="the inversion is not finite in fp16") as caught:
            avatar.render(POSES, **CHANGES)
    rebuild = f"build-engine tuned.ckpt -o {narrow / 'fp16.engine'} --backend torch --precision fp32 --size 32x32"
    assert caught.value.hint and caught.value.hint.endswith(rebuild)


@pytest.mark.parametrize("narrow", ["bf16", "fp16", "int8"])
def test_openvino_compiles_the_same_networks_for_float32(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, narrow: str
) -> None:
    """bfloat16 on any processor: what is loaded for it, or for 8 bits, gives NaN here, as an overflow would. The IR holds
    float32, so what comes out are the bytes of an engine built for that.
    """
    pytest.importorskip("openvino")
    from posecrafter_rt.engines import openvino

    if narrow == "int8" and missing_bytes_reason() is not None:
        pytest.skip(str(missing_bytes_reason()))
    monkeypatch.setattr(openvino, "cpu_has_bf16", lambda: True)
    overflowing(tiny_base, 1.0).save(tmp_path / "tuned.ckpt")
    folder = build_engine(tmp_path / "tuned.ckpt", tmp_path / "fp32.engine", BuildOptions("openvino", "fp32")).folder
    # The networks of the two differ when they are compiled, not before.
    shutil.copytree(folder.path, tmp_path / f"{narrow}.engine")
    write_manifest(tmp_path / f"{narrow}.engine", {**folder.manifest, "precision": narrow})
    load, call, overflowing_ones = openvino.OpenVinoBackend.load, openvino.OpenVinoEngine.__call__, list[Engine]()

    def loads(backend: Any, networks: Path, arch: Any, precision: str, *arguments: Any) -> dict[str, Engine]:
        engines = load(backend, networks, arch, precision, *arguments)
        overflowing_ones.extend([engines["unet"]] if precision == narrow else [])
        return engines

    def overflows(engine: Any, **inputs: Tensor) -> dict[str, Tensor]:
        outputs = call(engine, **inputs)
        is_narrow = any(engine is one for one in overflowing_ones)
        return {name: tensor * float("nan") for name, tensor in outputs.items()} if is_narrow else outputs

    monkeypatch.setattr(openvino.OpenVinoBackend, "load", loads)
    monkeypatch.setattr(openvino.OpenVinoEngine, "__call__", overflows)
    renders = []
    for precision in ("fp32", narrow):
        with Avatar.load(tmp_path / f"{precision}.engine") as avatar:
            renders.append(avatar.render(POSES[:3], **CHANGES))
            adjustments = report_of(avatar)["adjustments"]
            assert [adjustment["reason"] for adjustment in adjustments] == (
                [f"the inversion was not finite in {narrow}"] if precision == narrow else [])  # fmt: skip
    assert np.array_equal(*renders)


def test_computing_in_parts_comes_before_shorter_segments_and_gives_the_same_frames(
    avatar: Avatar, starve: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is enough once blocks do 896 tokens at once: 14 frames of 256, halved twice."""
    joint = avatar.render(POSES, **CHANGES)
    monkeypatch.setattr("posecrafter_rt.avatar_networks.LEAST_TOKENS", 512)
    starve("unet", lambda call, frames: avatar.networks.tokens_at_once != 896)
    frames = avatar.render(POSES, **CHANGES)
    report = report_of(avatar)
    assert [adjustment["tokens_at_once"] for adjustment in report["adjustments"]] == [1792, 896]
    assert report["segments"] == [13] and report["approximations"] == {"num_inference_steps": 2}
    assert not report["claims_byte_equality"]  # products of matrices of another shape may round otherwise
    assert abs(frames.astype(int) - joint).max() <= 1
    monkeypatch.undo()
    assert np.array_equal(avatar.render(POSES, **CHANGES), joint)  # the next render tries again
    assert avatar.networks.tokens_at_once is None and not report_of(avatar)["adjustments"]


def test_where_parts_are_not_enough_segments_become_shorter_and_a_resumed_render_keeps_to_both(
    avatar: Avatar, starve: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posecrafter_rt.avatar_networks.LEAST_TOKENS", 512)
    seen: list[int | None] = []

    def runs_out(call: int, frames: int) -> bool:
        seen.append(avatar.networks.tokens_at_once)
        return call >= 2 + 2 and frames > 4  # two steps of the inversion, two of the first segment

    forget_inversions(avatar)
    starve("unet", runs_out)
    segments, finished = avatar.iter_segments(POSES, segment=6, **CHANGES), []
    whole = []
    for segment in segments:
        whole += list(segment.frames)
        finished.append(segment)
    report = report_of(avatar)
    assert [{*adjustment} - {"frame", "reason"} for adjustment in report["adjustments"]] == [
        {"tokens_at_once"}, {"segment", "overlap"}]  # fmt: skip
    assert report["segments"] == [6, 3, 3, 3, 3, 2] and report["adjustments"][0]["tokens_at_once"] == 7 * 256 // 2
    starve("unet", lambda call, frames: bool(seen.append(avatar.networks.tokens_at_once)))
    for number in (1, 2):
        seen.clear()
        rest = avatar.iter_segments(POSES, segment=6, finished=[part.report for part in finished[:number]],
                                    carried=finished[number - 1].carried, **CHANGES)  # fmt: skip
        frames = [frame for segment in rest for frame in segment.frames]
        # After the first segment alone nothing had run out yet; after the second both changes hold from the start.
        assert {*seen} == ({None} if number == 1 else {896})
        if number == 2:
            assert np.array_equal(np.stack(frames), np.stack(whole)[-len(frames) :])


@pytest.mark.parametrize("decoder", ["full", "small"])
@pytest.mark.usefixtures("fp16_runs")
def test_a_frame_that_float16_does_not_hold_is_decoded_once_more(tiny_base: Path, tmp_path: Path, decoder: str) -> None:
    """Only the small decoder runs in float16 there. Its first convolution adds what the next one takes out of range."""
    checkpoint = untrained_checkpoint(str(tiny_base), num_frames=3)
    extremes = {"small_decoder.conv_in.bias": 30_000.0, "small_decoder.levels.0.0.conv1.weight": 1.0}
    changed = {name: torch.full_like(checkpoint.tensors[name], value) for name, value in extremes.items()}
    replace(checkpoint, tensors={**checkpoint.tensors, **changed}).save(tmp_path / "tuned.ckpt")
    renders = {}
    for precision in ("fp32", "fp16"):
        build_engine(tmp_path / "tuned.ckpt", tmp_path / precision, BuildOptions("torch", precision))
        with Avatar.load(tmp_path / precision) as avatar:
            renders[precision] = avatar.render(POSES[:3], decoder=decoder, **CHANGES).astype(int)
            adjustments = report_of(avatar)["adjustments"]
            if precision == "fp32" or decoder == "full":
                assert not adjustments
            else:
                assert adjustments == [{"frame": 0, "precision": "fp32", "reason": "frame 0 was not finite in fp16"}]
                assert avatar.networks.precision == "fp32" and report_of(avatar)["claims_byte_equality"]
                avatar.networks.use("fp16")
                with avatar.stream(steps=1, inversion_substeps=1) as stream:  # which decodes the reference
                    assert stream.step(POSES.keypoints[0]).any() and avatar.networks.precision == "fp32"
    assert abs(renders["fp16"] - renders["fp32"]).mean() < 1


def test_a_frame_that_no_type_holds_is_a_clear_failure(avatar: Avatar, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TorchEngine.__call__

    def spoiled(engine: TorchEngine, **inputs: Tensor) -> dict[str, Tensor]:
        outputs = original(engine, **inputs)
        if engine.spec.name == "vae_decoder":
            outputs["pixels"] = outputs["pixels"].clone()
            outputs["pixels"][0, 1, 5, 7] = float("nan")  # one number of them
        return outputs

    monkeypatch.setattr(TorchEngine, "__call__", spoiled)
    with pytest.raises(PoseCrafterError, match="frame 0 is not finite in fp32"):
        avatar.render(POSES, **CHANGES)
