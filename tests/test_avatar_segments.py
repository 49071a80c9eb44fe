"""Clips in segments on a tiny base: what each network sees, what the report says, and going on from a finished one."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import posecrafter_rt
from bench.runs import forget_inversions
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.avatar_once import KEPT
from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.rendering import render_to_files
from posecrafter_rt.runtime.memory import USED_SHARE
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.runtime.segments import split_clip
from posecrafter_rt.video_io import VideoWriter
from tests.tiny import SIZE, CountingThreads, Watched, break_off, some_poses

SEGMENTS = {"num_inference_steps": 2, "segment": 6, "overlap": 2}


@pytest.mark.parametrize("count", [5, 6])
def test_a_clip_that_fits_into_one_segment_is_rendered_as_without(avatar: Avatar, count: int) -> None:
    plain = avatar.render(some_poses(count), num_inference_steps=2)
    assert np.array_equal(avatar.render(some_poses(count), **SEGMENTS), plain)
    assert avatar.last_report is not None and avatar.last_report.num_segments == 1


def test_segments_are_clips_of_their_own_blended_where_they_overlap(
    avatar: Avatar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """13 frames in segments of 6 that share 2 are 3 of 6 frames, of which two share 3; each is its own render."""
    poses = some_poses(13)
    spans = split_clip(13, 6, 2)
    assert [(span.start, span.stop) for span in spans] == [(0, 6), (3, 9), (7, 13)]
    rendered = avatar.render(poses, **SEGMENTS)
    monkeypatch.setattr("posecrafter_rt.avatar.select_reference", lambda train, target: reference)
    assert avatar.last_report is not None
    reference = avatar.last_report.reference_index  # of the whole clip, which a part alone might not choose
    for earlier, span in zip([None, *spans], spans, strict=False):
        alone = avatar.render(poses[span.start : span.stop], num_inference_steps=2)
        shared = 0 if earlier is None else earlier.stop - span.start
        settled = slice(shared, span.settled - span.start)
        assert np.array_equal(rendered[span.start : span.settled][settled], alone[settled])
        if shared:
            assert not np.array_equal(rendered[span.start : span.start + shared], alone[:shared])


def test_the_report_names_the_segments_and_counts_each_frame_once(avatar: Avatar) -> None:
    keypoints = some_poses(13).keypoints.copy()
    keypoints[[3, 4, 9], 92:113] = 0  # the left hand of frames that two segments render, and of one that ends the clip
    keypoints[12, 24:92] = 0
    poses = PoseSequence(keypoints, SIZE)
    avatar.render(poses, num_inference_steps=2)
    assert avatar.last_report is not None
    whole = avatar.last_report.to_json()
    avatar.render(poses, **SEGMENTS)
    split = avatar.last_report.to_json()
    assert whole["num_segments"] == 1 and whole["options"]["segment"] is None
    assert split["num_segments"] == 3 and (split["options"]["segment"], split["options"]["overlap"]) == (6, 2)
    assert [(skipped["frame"], skipped["region"]) for skipped in split["skipped_regions"]] == [
        (3, "left_hand"), (4, "left_hand"), (9, "left_hand"), (12, "face")]  # fmt: skip
    for name in ("skipped_regions", "edited_regions", "reference_index"):
        assert split[name] == whole[name], name
    assert set(split["seconds"]) == {"prepare", "invert", "denoise", "decode"}


def test_no_network_ever_sees_more_than_one_segment(avatar: Avatar, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is computed once a render is not computed again for each segment."""
    seen: dict[str, list[int]] = {name: [] for name in avatar.engines}

    for name, engine in list(avatar.engines.items()):
        monkeypatch.setitem(avatar.engines, name, Watched(engine, seen[name]))
    for count in (14, 26):
        for calls in seen.values():
            calls.clear()
        avatar._once.forget()
        taken = 0
        for _ in avatar.iter_render(some_poses(count), inversion_substeps=1, **SEGMENTS):
            taken += 1
            # A segment's frames come before the next one's are denoised.
            assert len(seen["unet"]) <= 2 + 2 * (1 + (taken - 1) // 3)
        assert taken == count
        for name in ("controlnet", "unet"):
            assert max(seen[name]) == 1 + 6  # the reference and a segment
        assert {*seen["pose_embedding"], *seen["vae_decoder"]} == {1}  # what sees frames apart is given them apart
        assert sum(seen["vae_decoder"]) == count  # each frame once, the reference never
        assert len(seen["vae_encoder"]) <= 1 and seen["text_encoder"] == [1] and len(seen["time_tables"]) == 1
        segments = split_clip(count, 6, 2)
        assert len(seen["pose_embedding"]) == 1 + sum(segment.stop - segment.start for segment in segments)


def test_torch_leaves_the_cores_to_networks_that_have_their_own_threads(
    avatar: Avatar, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[bool, set[int]] = {has_own: set() for has_own in (True, False)}
    avatar.render(some_poses(2), num_inference_steps=2)  # inverts
    unet = avatar.engines["unet"]
    for has_own, seen in threads.items():
        monkeypatch.setitem(avatar.engines, "unet", CountingThreads(unet, has_own, seen))
        avatar.render(some_poses(2), num_inference_steps=2)
    assert threads == {True: {1}, False: {2}}


def test_what_depends_on_the_avatar_alone_is_computed_once_whatever_the_timesteps(
    avatar: Avatar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inversion walks finer timesteps than the sampler, with the same prompt and the same reference."""
    forget_inversions(avatar)
    seen: dict[str, list[int]] = {name: [] for name in (
        "text_encoder", "prompt_kv", "time_tables", "pose_embedding", "vae_encoder")}  # fmt: skip
    for name, calls in seen.items():
        monkeypatch.setitem(avatar.engines, name, Watched(avatar.engines[name], calls))
    avatar.render(some_poses(3), num_inference_steps=2, inversion_substeps=3)
    assert avatar.last_report is not None and not avatar.last_report.inversion_cached
    assert {name: len(calls) for name, calls in seen.items()} == {
        "text_encoder": 1, "prompt_kv": 1, "time_tables": 2, "pose_embedding": 1 + 3, "vae_encoder": 1}  # fmt: skip
    reference = avatar.last_report.reference_index
    avatar.render(some_poses(3), num_inference_steps=3, prompt="a woman")
    assert avatar.last_report.reference_index == reference
    # The source prompt is still there for this inversion.
    assert {name: len(calls) for name, calls in seen.items()} == {
        "text_encoder": 2, "prompt_kv": 2, "time_tables": 3, "pose_embedding": 1 + 3 + 3, "vae_encoder": 1}  # fmt: skip


def test_little_is_kept_over_renders_of_many_prompts_and_step_counts(avatar: Avatar) -> None:
    for number in range(2, 4 + KEPT):
        avatar.render(some_poses(1), num_inference_steps=number, prompt=f"person {number}", inversion_substeps=1)
    once = avatar._once
    assert len(once._text_tables) == len(once._time_tables) == KEPT
    assert len(once._embeddings) == len(once._latents) <= KEPT


def test_going_on_from_a_finished_segment_gives_the_same_bytes(avatar: Avatar) -> None:
    poses = some_poses(13)
    whole = avatar.render(poses, **SEGMENTS)
    first = next(avatar.iter_segments(poses, **SEGMENTS))
    head = list(first.frames)
    rest = avatar.iter_segments(poses, finished=[first.report], carried=first.carried, **SEGMENTS)
    frames = [*head, *(frame for segment in rest for frame in segment.frames)]
    assert np.array_equal(np.stack(frames), whole)
    assert avatar.last_report is not None and avatar.last_report.num_resumed == 1


def test_automatic_segments_are_those_that_fit(avatar: Avatar, monkeypatch: pytest.MonkeyPatch) -> None:
    poses, changes = some_poses(13), {**SEGMENTS, "segment": "auto"}
    whole = avatar.render(poses, num_inference_steps=2)
    assert np.array_equal(avatar.render(poses, **changes), whole)  # this machine has memory for so much
    assert avatar.last_report is not None and avatar.last_report.num_segments == 1
    assert str(avatar.last_report.segment_reason).startswith("the whole clip fits, at ")
    monkeypatch.setattr("posecrafter_rt.avatar_networks.free_bytes", lambda device_type: 0)
    split = avatar.render(poses, **changes)
    assert avatar.last_report.num_segments == 3 and avatar.last_report.options.segment == 6
    assert avatar.last_report.to_json()["claims_byte_equality"]  # of a run with the options that it reports, as here:
    assert np.array_equal(split, avatar.render(poses, avatar.last_report.options))
    assert np.array_equal(split, avatar.render(poses, **SEGMENTS))


def test_automatic_segments_come_after_the_whole_clip_in_parts(
    avatar: Avatar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for 13.5 frames at once: the reference and 13 fit in parts alone. An unfinished render keeps to that."""
    changes = {**SEGMENTS, "inversion_substeps": 1}
    poses, options = some_poses(13), RenderOptions(**{**changes, "segment": "auto"})
    whole = avatar.render(poses, **{**changes, "segment": None})
    monkeypatch.setattr("posecrafter_rt.avatar_networks.LEAST_TOKENS", 512)  # two frames
    room = avatar.networks.room(avatar.resolve(options))

    def give_frames(num_frames: float) -> None:
        free = (room.reserved + num_frames * room.per_frame) / USED_SHARE
        monkeypatch.setattr("posecrafter_rt.avatar_networks.free_bytes", lambda device_type: int(free))

    give_frames(13.5)
    in_parts = avatar.render(poses, options)
    assert avatar.last_report is not None and avatar.networks.tokens_at_once == 512
    report = avatar.last_report.to_json()
    assert report["segments"] == [13] and "segment" not in report["approximations"]
    assert [adjustment["tokens_at_once"] for adjustment in report["adjustments"]] == [512]
    assert "the whole clip fits in parts" in report["segment_reason"] and not report["claims_byte_equality"]
    assert abs(in_parts.astype(int) - whole).max() <= 1

    with monkeypatch.context() as patch:
        patch.setattr(VideoWriter, "write", broken_off)
        with pytest.raises(KeyboardInterrupt):
            render_to_files(avatar, poses, tmp_path / "out.mp4", options)
    give_frames(99)
    resumed = render_to_files(avatar, poses, tmp_path / "out.mp4", options)
    assert resumed["num_resumed"] == 1
    for name in ("segments", "adjustments", "segment_reason", "claims_byte_equality"):
        assert resumed[name] == report[name], name

    for change in ("too little", "an engine that cannot"):
        give_frames(5 if change == "too little" else 13.5)
        monkeypatch.setattr("posecrafter_rt.avatar_networks.IN_PARTS", ("torch",) if change == "too little" else ())
        avatar.render(poses, options)
        assert avatar.last_report.num_segments > 1 and not avatar.last_report.adjustments, change


def broken_off(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_with_guidance_both_passes_are_one_call(avatar: Avatar, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of twice the frames, the reference among them, at every step; the inversion has neither guidance nor other frames."""
    forget_inversions(avatar)
    seen: dict[str, list[int]] = {"controlnet": [], "unet": []}
    for name, calls in seen.items():
        monkeypatch.setitem(avatar.engines, name, Watched(avatar.engines[name], calls))
    avatar.render(some_poses(4), num_inference_steps=3, inversion_substeps=1, strength=1.0, guidance_scale=3.0)
    for name, calls in seen.items():
        assert calls == [1] * 3 + [2 * (1 + 4)] * 3, name


@pytest.mark.parametrize("mode", ["controlvideo", "+selection"])
def test_modes_without_a_common_key_frame_are_not_split(avatar: Avatar, mode: str) -> None:
    with pytest.raises(PoseCrafterError, match="no key frame is common"):
        avatar.render(some_poses(3), mode=mode, **SEGMENTS)


def test_a_clock_that_jumps_backwards_changes_nothing(
    avatar: Avatar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour at every look, while a render is broken off after its first segment and gone on with."""
    poses, options = some_poses(13), RenderOptions(**SEGMENTS)
    whole = render_to_files(avatar, poses, tmp_path / "whole.mp4", options)
    clock = itertools.count(2_000_000_000, -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    monkeypatch.setattr(time, "time_ns", lambda: next(clock) * 10**9)
    break_off(avatar, poses, tmp_path / "broken.mp4", options, after=1)
    resumed = render_to_files(avatar, poses, tmp_path / "broken.mp4", options)
    assert resumed["num_resumed"] == 1 and resumed["segments"] == whole["segments"]
    assert all(seconds >= 0 for seconds in resumed["seconds"].values())
    assert (tmp_path / "broken.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


@pytest.mark.parametrize("threads", [[2], [1, 2]])
def test_what_another_number_of_threads_goes_on_with_claims_no_equal_bytes(
    avatar: Avatar, tmp_path: Path, threads: list[int]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU it does not matter")
    poses, options, before = some_poses(13), RenderOptions(**SEGMENTS), torch.get_num_threads()
    try:
        torch.set_num_threads(threads[0])
        break_off(avatar, poses, tmp_path / "broken.mp4", options, after=1)
        torch.set_num_threads(threads[-1])
        report = render_to_files(avatar, poses, tmp_path / "broken.mp4", options)
    finally:
        torch.set_num_threads(before)
    assert report["num_resumed"] == 1 and report["threads"] == threads
    assert report["claims_byte_equality"] == (len(threads) == 1)


def test_another_number_of_threads_computes_all_of_its_own(avatar: Avatar) -> None:
    """What another number has left in the folder or in memory may be rounded otherwise: bytes would depend on what ran before."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU it does not matter")
    before, seen = torch.get_num_threads(), []
    forget_inversions(avatar)
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            avatar.render(some_poses(3), num_inference_steps=2, inversion_substeps=1)
            assert avatar.last_report is not None
            once = avatar._once
            kept = len(once._text_tables), len(once._time_tables), len(once._embeddings), len(once._latents)
            seen.append((avatar.last_report.inversion_cached, kept))
    finally:
        torch.set_num_threads(before)
    (first, kept), *others = seen
    both = tuple(2 * number for number in kept)
    assert not first and others == [(False, both), (True, both), (True, both)]


def test_no_part_of_the_package_reads_the_clock_on_the_wall() -> None:
    """So that none can be misled when it is set; durations come from clocks that only go on."""
    reads = re.compile(r"\btime\.(time|time_ns|ctime|localtime|gmtime)\b|\bdatetime\b|from time import")
    root = Path(posecrafter_rt.__file__).parents[1]
    files = [file for folder in ("posecrafter_rt", "kernels", "export") for file in (root / folder).rglob("*.py")
             if "node_modules" not in file.parts]  # fmt: skip
    assert len(files) > 100
    assert [str(file) for file in files if reads.search(file.read_text(encoding="utf-8"))] == []
