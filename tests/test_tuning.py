"""Tuning: what it trains, that a seed reproduces it, and that an interrupted run ends like an unbroken one."""

from __future__ import annotations

import json
import pkgutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posecrafter_rt import tuning
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.errors import (
    BackendUnavailable,
    CheckpointError,
    OutOfMemory,
    OutputExists,
    PoseCrafterError,
    PoseError,
)
from posecrafter_rt.models.loading import load_base, named_parameters
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.tuning import (
    TuneOptions,
    TuneStatus,
    choose_frames,
    learning_rate_at,
    load_clip,
    resolve_precision,
    trainable_parameters,
    tune,
)
from posecrafter_rt.tuning_losses import draw_timestep
from posecrafter_rt.video_io import stream_video, write_video

SIZE = (32, 32)


@pytest.fixture
def clip() -> tuple[np.ndarray, PoseSequence]:
    rng = np.random.default_rng(0)
    keypoints = np.concatenate([rng.uniform(2, 30, (5, 134, 2)), np.ones((5, 134, 1))], axis=-1)
    return rng.integers(0, 256, (5, *SIZE, 3), np.uint8), PoseSequence(keypoints.astype(np.float32), SIZE, 25.0)


@pytest.fixture
def options(tiny_base: Path) -> TuneOptions:
    return TuneOptions(base=str(tiny_base), frames=3, steps=4, precision="fp32")


def same_tensors(a: Checkpoint, b: Checkpoint) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


def interrupt_at(step: int) -> Callable[[TuneStatus], None]:
    def on_step(status: TuneStatus) -> None:
        if status.step == step:
            raise KeyboardInterrupt

    return on_step


def test_trains_exactly_the_methods_parameters(clip, options, tmp_path: Path) -> None:
    checkpoint = tune(*clip, tmp_path / "a.ckpt", options)
    model = load_base(options.base)
    expected = {
        name for name, _ in named_parameters(model)
        if ".attn1.to_out." in name or ".attn_temp." in name or ".conv_temp." in name
    }  # fmt: skip
    assert set(checkpoint.tensors) == expected
    assert not any(name.startswith("controlnet") and "temp" in name for name in expected)
    changed = {name for name, parameter in named_parameters(model) if name in expected
               and not torch.equal(parameter, checkpoint.tensors[name])}  # fmt: skip
    assert {name for name in expected if ".conv_temp." in name} <= changed


def test_a_seed_reproduces_and_another_differs(clip, options, tmp_path: Path) -> None:
    first = tune(*clip, tmp_path / "a.ckpt", options)
    again = tune(*clip, tmp_path / "b.ckpt", options)
    other = tune(*clip, tmp_path / "c.ckpt", TuneOptions(**{**vars(options), "seed": 1}))
    assert same_tensors(first, again)
    assert not same_tensors(first, other)


def test_the_file_holds_what_was_returned(clip, options, tmp_path: Path) -> None:
    checkpoint = tune(*clip, tmp_path / "a.ckpt", options)
    loaded = Checkpoint.load(tmp_path / "a.ckpt")
    assert same_tensors(checkpoint, loaded)
    assert loaded.metadata["steps"] == 4 and loaded.metadata["base"] == options.base
    assert loaded.metadata["schedule"] == {
        "prediction_type": "epsilon", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
        "num_train_timesteps": 1000,
    }  # fmt: skip
    assert np.array_equal(loaded.frames, clip[0][[0, 2, 4]])


def test_an_interrupted_run_resumes_to_the_same_result(clip, options, tmp_path: Path) -> None:
    unbroken = tune(*clip, tmp_path / "a.ckpt", options)
    with pytest.raises(KeyboardInterrupt):
        tune(*clip, tmp_path / "b.ckpt", options, on_step=interrupt_at(2))
    assert not (tmp_path / "b.ckpt").exists() and (tmp_path / "b.ckpt.partial").exists()
    steps: list[int] = []
    resumed = tune(*clip, tmp_path / "b.ckpt", options, on_step=lambda status: steps.append(status.step))
    assert steps == [3, 4]
    assert same_tensors(unbroken, resumed)
    assert not (tmp_path / "b.ckpt.partial").exists()


def test_the_decoder_is_tuned_after_the_denoiser_and_nears_the_frames(clip, options, tmp_path: Path) -> None:
    without = tune(*clip, tmp_path / "a.ckpt", options)
    statuses: list[TuneStatus] = []
    options = TuneOptions(**{**vars(options), "decoder_steps": 40})
    checkpoint = tune(*clip, tmp_path / "b.ckpt", options, on_step=statuses.append)
    assert [status.part for status in statuses] == ["denoiser"] * 4 + ["decoder"] * 40
    assert {status.steps for status in statuses} == {44} and checkpoint.metadata["decoder_steps"] == 40
    tuned = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("vae.")}
    assert tuned and all(name.startswith(("vae.decoder.", "vae.post_quant_conv.")) for name in tuned)
    assert all(torch.equal(tensor, checkpoint.tensors[name]) for name, tensor in without.tensors.items())

    def error(checkpoint: Checkpoint) -> float:
        networks = checkpoint.load_model().networks()
        pixels = torch.from_numpy(checkpoint.frames).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        with torch.no_grad():
            return float((networks["vae_decoder"](networks["vae_encoder"](pixels)[0])[0] - pixels).square().mean())

    assert error(checkpoint) < 0.9 * error(without)


def test_a_small_decoder_is_distilled_at_last_and_nears_the_full_one(clip, options, tmp_path: Path) -> None:
    options = replace(options, decoder_steps=2)
    without = tune(*clip, tmp_path / "a.ckpt", options)
    statuses: list[TuneStatus] = []
    options = replace(options, small_decoder_steps=60)
    checkpoint = tune(*clip, tmp_path / "b.ckpt", options, on_step=statuses.append)
    assert [status.part for status in statuses] == ["denoiser"] * 4 + ["decoder"] * 2 + ["small decoder"] * 60
    assert all(torch.equal(tensor, checkpoint.tensors[name]) for name, tensor in without.tensors.items())
    small = {name for name in checkpoint.tensors if name.startswith("small_decoder.")}
    assert small == set(checkpoint.tensors) - set(without.tensors) and without.metadata["small_decoder"] is None
    networks = Checkpoint.load(tmp_path / "b.ckpt").load_model().networks()
    pixels = torch.from_numpy(checkpoint.frames).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    with torch.no_grad():
        latents = networks["vae_encoder"](pixels)[0]
        full, near = networks["vae_decoder"](latents)[0], networks["vae_decoder_small"](latents)[0]
    assert float((near - full).square().mean()) < 0.9 * float(full.square().mean())  # of noise, which frames here are
    with pytest.raises(KeyboardInterrupt):
        tune(*clip, tmp_path / "c.ckpt", options, on_step=interrupt_at(40))
    assert same_tensors(tune(*clip, tmp_path / "c.ckpt", options), checkpoint)


def test_a_checkpoint_with_half_a_small_decoder_is_refused(clip, options, tmp_path: Path) -> None:
    checkpoint = tune(*clip, tmp_path / "a.ckpt", replace(options, steps=0, small_decoder_steps=1))
    del checkpoint.tensors["small_decoder.conv_in.bias"]
    with pytest.raises(CheckpointError, match="its small decoder is not complete"):
        checkpoint.load_model()


@pytest.mark.parametrize(
    "place", ["posecrafter_rt.tuning_losses._predict", "torch.nn.utils.clip_grad_norm_", "torch.optim.AdamW.step"]
)
def test_an_interruption_within_a_step_changes_nothing_either(
    clip, options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    unbroken = tune(*clip, tmp_path / "a.ckpt", options)
    original, calls = pkgutil.resolve_name(place), []

    def interrupted(*arguments: object, **named: object) -> object:
        result = original(*arguments, **named)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(place, interrupted)
    monkeypatch.setattr("posecrafter_rt.tuning.SAVE_EVERY_SECONDS", 0.0)  # what a kill would leave, after each step
    with pytest.raises(KeyboardInterrupt):
        tune(*clip, tmp_path / "b.ckpt", options)
    steps: list[int] = []
    resumed = tune(*clip, tmp_path / "b.ckpt", options, on_step=lambda status: steps.append(status.step))
    assert steps == [3, 4] and same_tensors(unbroken, resumed)


def test_an_interruption_while_a_gpu_is_waited_for_keeps_every_finished_step(
    clip, options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's time passes where the loss is read, and the signal is raised after that; nothing was saved before."""
    unbroken = tune(*clip, tmp_path / "a.ckpt", options)
    original, reads = torch.Tensor.item, []

    def interrupted(tensor: torch.Tensor) -> object:
        number = original(tensor)
        reads.extend([number] if tensor.requires_grad else [])  # a loss
        if tensor.requires_grad and len(reads) == 3:
            raise KeyboardInterrupt
        return number

    monkeypatch.setattr(torch.Tensor, "item", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(*clip, tmp_path / "b.ckpt", options)
    steps: list[int] = []
    resumed = tune(*clip, tmp_path / "b.ckpt", options, on_step=lambda status: steps.append(status.step))
    assert steps == [3, 4] and same_tensors(unbroken, resumed)


def test_a_run_with_other_settings_of_the_base_is_not_resumed(
    clip, options, tmp_path: Path, write_tiny_base: Callable[..., Path]
) -> None:
    folder = write_tiny_base(tmp_path / "base")
    options = replace(options, base=str(folder))
    with pytest.raises(KeyboardInterrupt):
        tune(*clip, tmp_path / "a.ckpt", options, on_step=interrupt_at(2))
    settings = json.loads((folder / "posecrafter.json").read_text())
    (folder / "posecrafter.json").write_text(json.dumps({**settings, "trainable": ["conv_in"]}))
    steps: list[int] = []
    with pytest.raises(OutputExists, match=r"a\.ckpt\.partial holds an unfinished tuning"):
        tune(*clip, tmp_path / "a.ckpt", options)
    checkpoint = tune(*clip, tmp_path / "a.ckpt", options, force=True, on_step=lambda status: steps.append(status.step))
    assert steps == [1, 2, 3, 4] and all("conv_in" in name for name in checkpoint.tensors)


@pytest.mark.parametrize(
    "change", [{"learning_rate": 0.0}, {"learning_rate": -1e-3}, {"learning_rate": float("nan")}, {"steps": -1}, {"decoder_steps": -1}, {"small_decoder_steps": -1}, {"frames": 0}, {"precision": "int8"}, {"norm_scope": "clips"}, {"controlvideo_weights": ("no-unet.pt", "no-controlnet.pt")}]
)  # fmt: skip
def test_senseless_numbers_are_refused(change: dict) -> None:
    with pytest.raises(PoseCrafterError):
        TuneOptions(**change)


def test_numbers_of_any_library_become_pythons_own() -> None:
    """For the checkpoint's metadata, which are written as JSON."""
    given = TuneOptions(frames=np.int64(4), steps=np.int32(50), learning_rate=np.float32(0.5), seed=np.uint8(7))  # type: ignore[arg-type]
    assert given == TuneOptions(frames=4, steps=50, learning_rate=0.5, seed=7)
    assert {type(value) for value in vars(given).values()} <= {int, float, str, bool, type(None)}


def test_weights_of_controlvideo_are_taken_as_they_are_or_tuned_on(clip, options, tmp_path: Path) -> None:
    tuned = tune(*clip, tmp_path / "a.ckpt", options)
    files = []
    for network in ("unet", "controlnet"):
        tensors = {name.removeprefix(f"{network}."): tensor for name, tensor in tuned.tensors.items()
                   if name.startswith(f"{network}.")}  # fmt: skip
        files.append(tmp_path / f"4-{network}.pt")
        torch.save(tensors, files[-1])
    options = replace(options, controlvideo_weights=(files[0], files[1]))
    taken = tune(*clip, tmp_path / "b.ckpt", replace(options, steps=0))
    assert same_tensors(taken, tuned) and taken.metadata["steps"] == 0
    assert (tuned.metadata["norm_scope"], taken.metadata["norm_scope"]) == ("frame", "clip")  # as they were trained
    further = tune(*clip, tmp_path / "c.ckpt", replace(options, steps=2, norm_scope="frame"))
    assert not same_tensors(further, tuned) and further.metadata["norm_scope"] == "frame"


def test_weights_of_controlvideo_are_kept_where_the_base_tunes_fewer(
    clip, options, tmp_path: Path, write_tiny_base: Callable[..., Path]
) -> None:
    tuned = tune(*clip, tmp_path / "a.ckpt", options)
    files = []
    for network in ("unet", "controlnet"):
        files.append(tmp_path / f"4-{network}.pt")
        torch.save({name.removeprefix(f"{network}."): tensor + 1 for name, tensor in tuned.tensors.items()
                    if name.startswith(f"{network}.")}, files[-1])  # fmt: skip
    base = write_tiny_base(tmp_path / "narrow", settings={"trainable": [r"\.conv_temp\."]})
    options = replace(options, base=str(base), controlvideo_weights=(files[0], files[1]), steps=1)
    checkpoint = tune(*clip, tmp_path / "b.ckpt", options)
    assert set(checkpoint.tensors) == set(tuned.tensors)
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(tensor, tuned.tensors[name] + 1) is (".conv_temp." not in name)


@pytest.mark.parametrize("interruption", [2, 4, 5])
def test_a_run_interrupted_in_either_part_resumes(clip, options, tmp_path: Path, interruption: int) -> None:
    options = TuneOptions(**{**vars(options), "decoder_steps": 3})
    unbroken = tune(*clip, tmp_path / "a.ckpt", options)
    with pytest.raises(KeyboardInterrupt):
        tune(*clip, tmp_path / "b.ckpt", options, on_step=interrupt_at(interruption))
    steps: list[int] = []
    resumed = tune(*clip, tmp_path / "b.ckpt", options, on_step=lambda status: steps.append(status.step))
    assert steps == list(range(interruption + 1, 8)) and same_tensors(unbroken, resumed)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"some text\n", b"hello world, a longer text"])
def test_a_torn_or_foreign_partial_state_is_passed_over_with_a_warning(
    clip, options, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    unbroken = tune(*clip, tmp_path / "a.ckpt", options)
    (tmp_path / "b.ckpt.partial").write_bytes(content)
    assert same_tensors(unbroken, tune(*clip, tmp_path / "b.ckpt", options))
    assert len(caplog.messages) == 1 and "b.ckpt.partial is damaged, so tuning starts over: " in caplog.text


@pytest.mark.parametrize("anew", [{"force": True}, {"resume": False}])
def test_another_runs_state_is_kept_until_it_is_given_up(clip, options, tmp_path: Path, anew: dict[str, bool]) -> None:
    unbroken = tune(*clip, tmp_path / "a.ckpt", options)
    with pytest.raises(KeyboardInterrupt):
        tune(*clip, tmp_path / "c.ckpt", replace(options, seed=7), on_step=interrupt_at(1))
    kept = (tmp_path / "c.ckpt.partial").read_bytes()
    with pytest.raises(OutputExists, match=r"c\.ckpt\.partial holds an unfinished tuning") as caught:
        tune(*clip, tmp_path / "c.ckpt", options)
    assert "--force" in (caught.value.hint or "") and (tmp_path / "c.ckpt.partial").read_bytes() == kept
    assert same_tensors(unbroken, tune(*clip, tmp_path / "c.ckpt", options, **anew))


@pytest.mark.parametrize("began", ["bf16", "fp16"])
def test_a_run_that_may_choose_continues_in_the_precision_that_it_began_in(
    clip, options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, began: str
) -> None:
    """As after a cluster has moved it to another kind of machine, which would choose another."""
    options = replace(options, steps=2, precision=began)
    unbroken = tune(*clip, tmp_path / "a.ckpt", options)
    with pytest.raises(KeyboardInterrupt):
        tune(*clip, tmp_path / "b.ckpt", options, on_step=interrupt_at(1))
    monkeypatch.setattr(tuning, "cpu_gains_by_bf16", lambda: False)
    steps: list[int] = []
    auto = replace(options, precision="auto")
    resumed = tune(*clip, tmp_path / "b.ckpt", auto, on_step=lambda status: steps.append(status.step))
    assert steps == [2] and same_tensors(unbroken, resumed)
    assert Checkpoint.load(tmp_path / "b.ckpt").metadata["precision"] == resumed.metadata["precision"] == began


def test_the_precision_of_another_run_that_is_given_up_is_no_matter(
    clip, options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(*clip, tmp_path / "a.ckpt", replace(options, precision="bf16", seed=7), on_step=interrupt_at(1))
    monkeypatch.setattr(tuning, "cpu_gains_by_bf16", lambda: False)
    tuned = tune(*clip, tmp_path / "a.ckpt", replace(options, precision="auto"), force=True)
    assert tuned.metadata["precision"] == "fp32"


@pytest.mark.parametrize(
    ("change", "differing", "given"),
    [({"precision": "bf16"}, "precision", "--precision bf16"), ({"seed": 7, "steps": 5}, "seed, steps", "--seed 7 --steps 5"),
     ({"prompt": "a man"}, "prompt", "--prompt 'a man'"), ({"frames": 2}, "frames, poses or weights", "the same"),
     ({"steps": 5, "frames": 2}, "steps, frames, poses or weights", "the same"),
     ({"decoder_steps": 1}, "decoder steps", "--decoder-steps 1"),
     ({"small_decoder_steps": 1}, "small decoder steps", "--small-decoder-steps 1")],
)  # fmt: skip
def test_what_differs_from_an_unfinished_run_is_named_with_the_options_that_finish_it(
    clip, options, tmp_path: Path, change: dict[str, Any], differing: str, given: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(*clip, tmp_path / "a.ckpt", replace(options, **change), on_step=interrupt_at(1))
    with pytest.raises(OutputExists, match=f"holds an unfinished tuning that differs in {differing}$") as caught:
        tune(*clip, tmp_path / "a.ckpt", options)
    assert caught.value.hint == f"give {given} to finish it, or --force to throw it away"


def test_an_unfinished_run_of_an_earlier_version_is_kept(clip, options, tmp_path: Path) -> None:
    torch.save({"fingerprint": "0", "step": 1}, tmp_path / "a.ckpt.partial")
    with pytest.raises(OutputExists, match="unfinished tuning of another version") as caught:
        tune(*clip, tmp_path / "a.ckpt", options)
    assert "--force" in (caught.value.hint or "")
    tune(*clip, tmp_path / "a.ckpt", options, force=True)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here that the system cannot read")
def test_a_state_that_cannot_be_read_is_neither_passed_over_nor_replaced(
    clip, options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system may answer again later, and hours of tuning may be in it."""
    partial = tmp_path / "a.ckpt.partial"
    partial.symlink_to("/proc/self/mem")
    monkeypatch.setattr("posecrafter_rt.tuning.SAVE_EVERY_SECONDS", -1.0)
    with pytest.raises(CheckpointError, match=r"a\.ckpt\.partial, an unfinished tuning, cannot be read: Input"):
        tune(*clip, tmp_path / "a.ckpt", options)
    assert partial.is_symlink()
    tune(*clip, tmp_path / "a.ckpt", options, resume=False)


def test_a_state_that_memory_does_not_hold_is_kept(
    clip, options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(*clip, tmp_path / "a.ckpt", options, on_step=interrupt_at(2))
    kept = (tmp_path / "a.ckpt.partial").read_bytes()
    monkeypatch.setattr("posecrafter_rt.tuning.SAVE_EVERY_SECONDS", -1.0)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: torch.empty(1 << 60, dtype=torch.uint8))
        with pytest.raises(OutOfMemory, match="^memory ran out: "):
            tune(*clip, tmp_path / "a.ckpt", options)
    assert (tmp_path / "a.ckpt.partial").read_bytes() == kept


def test_it_is_the_same_whatever_device_a_program_has_made_the_default(clip, options, tmp_path: Path) -> None:
    options = replace(options, steps=1, decoder_steps=1, small_decoder_steps=1)
    expected = tune(*clip, tmp_path / "a.ckpt", options)
    torch.set_default_device("meta")
    try:
        with pytest.raises(KeyboardInterrupt):
            tune(*clip, tmp_path / "b.ckpt", options, on_step=interrupt_at(2))
        tuned = tune(*clip, tmp_path / "b.ckpt", options)
    finally:
        torch.set_default_device(None)
    assert same_tensors(tuned, expected)


def test_a_run_on_other_frames_is_not_resumed(clip, options, tmp_path: Path) -> None:
    frames, poses = clip
    others = frames.copy()
    others[-1, -1] ^= 255  # far from the first bytes
    with pytest.raises(KeyboardInterrupt):
        tune(others, poses, tmp_path / "a.ckpt", options, on_step=interrupt_at(2))
    steps: list[int] = []
    tune(frames, poses, tmp_path / "a.ckpt", options, force=True, on_step=lambda status: steps.append(status.step))
    assert steps == [1, 2, 3, 4]


def test_two_runs_of_one_checkpoint_do_not_share_their_state(clip, options, tmp_path: Path) -> None:
    refused = []

    def told(status) -> None:
        with pytest.raises(PoseCrafterError, match="another process is tuning") as caught:
            tune(*clip, tmp_path / "a.ckpt", replace(options, seed=7), force=True)
        refused.append(caught.value)

    tune(*clip, tmp_path / "a.ckpt", replace(options, steps=1), on_step=told)
    assert len(refused) == 1 and [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_what_another_run_has_written_meanwhile_is_kept(clip, options, tmp_path: Path, monkeypatch) -> None:
    """And not only once this run has ended."""
    base = load_base

    def loaded(*arguments, **named):
        (tmp_path / "a.ckpt").write_bytes(b"another's")
        return base(*arguments, **named)

    monkeypatch.setattr("posecrafter_rt.tuning.load_base", loaded)
    steps: list[int] = []
    with pytest.raises(OutputExists):
        tune(*clip, tmp_path / "a.ckpt", options, on_step=lambda status: steps.append(status.step))
    assert steps == [] and [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_no_resume_starts_over(clip, options, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(*clip, tmp_path / "a.ckpt", options, on_step=interrupt_at(2))
    steps: list[int] = []
    tune(*clip, tmp_path / "a.ckpt", options, resume=False, on_step=lambda status: steps.append(status.step))
    assert steps == [1, 2, 3, 4]


def test_bf16_and_gradient_checkpointing_run(clip, options, tmp_path: Path) -> None:
    plain = tune(*clip, tmp_path / "a.ckpt", options)
    recomputed = tune(*clip, tmp_path / "b.ckpt", TuneOptions(**{**vars(options), "gradient_checkpointing": True}))
    for name, tensor in plain.tensors.items():
        torch.testing.assert_close(recomputed.tensors[name], tensor, rtol=1e-4, atol=1e-5)
    half = tune(*clip, tmp_path / "c.ckpt", TuneOptions(**{**vars(options), "precision": "bf16"}))
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in half.tensors.values())


def test_timesteps_are_uniform_or_dwell_on_the_noisy_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.cat([draw_timestep(1000, 0.0, generator) for _ in range(4000)]).double()
    noisy = torch.cat([draw_timestep(1000, 1.0, generator) for _ in range(4000)]).double()
    assert uniform.min() >= 0 and uniform.max() <= 999 and noisy.max() <= 999
    assert abs(uniform.mean() - 499.5) < 15 and abs(noisy.mean() - 666) < 12  # density ∝ t: two thirds of the way


def test_a_prompt_that_is_cut_is_told(clip, options, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tune(*clip, tmp_path / "a.ckpt", replace(options, steps=1, prompt="a " * 75 + "red hat"))
    assert caplog.messages == ["the prompt has more than 75 tokens and is cut; left out is: red hat"]


def test_refuses_to_overwrite_before_any_work(clip, options, tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_text("mine")
    with pytest.raises(OutputExists):
        tune(*clip, tmp_path / "a.ckpt", options)
    assert (tmp_path / "a.ckpt").read_text() == "mine"


def test_frames_and_poses_must_pair_up(clip, options, tmp_path: Path) -> None:
    frames, poses = clip
    with pytest.raises(PoseError, match="4 frames but 5 poses"):
        tune(frames[:4], poses, tmp_path / "a.ckpt", options)


def test_a_diverging_loss_is_an_error_that_writes_nothing(clip, options, tmp_path: Path) -> None:
    wild = TuneOptions(**{**vars(options), "learning_rate": 1e30, "steps": 20})
    with pytest.raises(PoseCrafterError, match="the loss became"):
        tune(*clip, tmp_path / "a.ckpt", wild)
    assert not (tmp_path / "a.ckpt").exists()


def test_what_a_diverging_run_has_left_does_not_keep_its_hint_from_working(
    clip, options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posecrafter_rt.tuning.SAVE_EVERY_SECONDS", -1.0)
    with pytest.raises(PoseCrafterError, match="the loss became") as caught:
        tune(*clip, tmp_path / "a.ckpt", replace(options, learning_rate=1e30, steps=20))
    assert all(option in caught.value.hint for option in ("--no-resume", "--learning-rate", "--precision fp32"))
    with pytest.raises(OutputExists):  # so the option is needed
        tune(*clip, tmp_path / "a.ckpt", options)
    tune(*clip, tmp_path / "a.ckpt", options, resume=False)


def test_a_run_without_memory_names_the_options_that_take_less_and_goes_on_with_them(
    clip, options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starved(*_: object) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)  # more than any address space holds

    options = replace(options, decoder_steps=2)
    monkeypatch.setattr("posecrafter_rt.tuning.SAVE_EVERY_SECONDS", -1.0)
    steps: list[int] = []
    loss = tuning.denoiser_loss
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "denoiser_loss", lambda *given: loss(*given) if len(steps) < 2 else starved())
        with pytest.raises(OutOfMemory, match="^memory ran out: ") as caught:
            tune(*clip, tmp_path / "a.ckpt", options, on_step=lambda status: steps.append(status.step))
    assert "--gradient-checkpointing" in caught.value.hint and "--size, with --no-resume" in caught.value.hint
    less = replace(options, gradient_checkpointing=True)
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "denoiser_loss", starved)
        with pytest.raises(OutOfMemory) as caught:
            tune(*clip, tmp_path / "a.ckpt", less)
    assert "--gradient-checkpointing" not in caught.value.hint and "--size" in caught.value.hint
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "decoder_loss", starved)  # which does not checkpoint
        with pytest.raises(OutOfMemory) as caught:
            tune(*clip, tmp_path / "b.ckpt", options)
    assert "--gradient-checkpointing" not in caught.value.hint
    tune(*clip, tmp_path / "a.ckpt", less, on_step=lambda status: steps.append(status.step))
    assert steps == [1, 2, 3, 4, 5, 6]


def test_patterns_that_match_nothing_are_an_error(tiny_model) -> None:
    with pytest.raises(CheckpointError, match="matches"):
        trainable_parameters(tiny_model, ("no_such_layer",))


@pytest.mark.parametrize(
    ("available", "wanted", "chosen"), [(36, 8, [0, 5, 10, 15, 20, 25, 30, 35]), (3, 8, [0, 1, 2]), (5, 1, [0])]
)
def test_choose_frames(available: int, wanted: int, chosen: list[int]) -> None:
    assert choose_frames(available, wanted).tolist() == chosen


def test_learning_rate_is_constant_or_falls_to_a_tenth() -> None:
    assert {learning_rate_at(step, 100, decay=False) for step in range(100)} == {1.0}
    rates = [learning_rate_at(step, 100, decay=True) for step in range(100)]
    assert rates[0] < rates[19] and rates[20:] == sorted(rates[20:], reverse=True)
    assert learning_rate_at(100, 100, decay=True) == pytest.approx(0.1)


@pytest.mark.parametrize("unknown", ["fp8", "int8"])  # int8: an engine's alone
def test_resolve_precision(unknown: str) -> None:
    assert resolve_precision("cpu", "fp32") == ("cpu", "fp32")
    assert resolve_precision("cpu", "auto")[1] in ("fp32", "bf16")
    with pytest.raises(PoseCrafterError, match=unknown):
        resolve_precision("cpu", unknown)


def test_load_clip_moves_poses_with_frames_and_takes_the_window(clip, tmp_path: Path) -> None:
    frames, poses = clip
    write_video(tmp_path / "v.mp4", frames, 25.0)
    loaded, moved = load_clip(tmp_path / "v.mp4", poses, (64, 64), slice(1, 4))
    assert loaded.shape == (3, 64, 64, 3) and moved.canvas == (64, 64)
    np.testing.assert_allclose(moved.keypoints[..., :2], (poses.keypoints[1:4, :, :2] + 0.5) * 2 - 0.5, rtol=1e-5)
    with pytest.raises(PoseError, match="5 frames but there are 2 poses"):
        load_clip(tmp_path / "v.mp4", poses[:2], SIZE, slice(None))


def test_load_clip_refuses_a_window_that_does_not_show_the_person(clip, tmp_path: Path) -> None:
    frames, poses = clip
    write_video(tmp_path / "v.mp4", frames, 25.0)
    keypoints = poses.keypoints.copy()
    for confidence in (0, 0.2):  # neither is drawn
        keypoints[2, :, 2] = confidence
        gap = PoseSequence(keypoints, SIZE, 25.0)
        with pytest.raises(PoseError, match=r"v\.mp4 does not show the person in 1 of 4 frames: 2"):
            load_clip(tmp_path / "v.mp4", gap, SIZE, slice(1, 5), 2)  # 2 is not among the two that it would take
    assert len(load_clip(tmp_path / "v.mp4", gap, SIZE, slice(3, None))[1]) == 2


@pytest.mark.parametrize(
    ("window", "wanted", "expected"),
    [(slice(None), 3, [0, 6, 11]), (slice(1, 4), 2, [1, 3]), (slice(9, None), 8, [9, 10, 11])],
)
def test_load_clip_holds_only_the_frames_that_are_trained_on(
    tmp_path: Path, monkeypatch, window, wanted, expected
) -> None:
    keypoints = np.random.default_rng(0).uniform(2, 30, (12, 134, 3)) / [1, 1, 30]
    poses = PoseSequence(keypoints, SIZE, 25.0)
    write_video(tmp_path / "v.mp4", np.random.default_rng(1).integers(0, 256, (12, *SIZE, 3), np.uint8), 25.0)
    everything, _ = load_clip(tmp_path / "v.mp4", poses, SIZE, slice(None))
    read: list[weakref.ref[np.ndarray]] = []
    most_alive = 0

    def watched(path: Path) -> tuple[Iterator[np.ndarray], float]:
        frames, fps = stream_video(path)
        return (watch(frame) for frame in frames), fps

    def watch(frame: np.ndarray) -> np.ndarray:
        nonlocal most_alive
        read.append(weakref.ref(frame))
        most_alive = max(most_alive, sum(reference() is not None for reference in read))
        return frame

    monkeypatch.setattr("posecrafter_rt.tuning.stream_video", watched)
    loaded, moved = load_clip(tmp_path / "v.mp4", poses, SIZE, window, wanted)
    np.testing.assert_array_equal(loaded, everything[expected])
    np.testing.assert_array_equal(moved.keypoints, poses.keypoints[expected])
    assert len(read) == 12 and most_alive <= len(expected) + 2


def test_an_empty_prompt_is_one(clip, options, tmp_path: Path) -> None:
    assert tune(*clip, tmp_path / "a.ckpt", replace(options, prompt="", steps=0)).metadata["prompt"] == ""


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(PoseCrafterError, match="unknown device 'tpu'"):
        resolve_precision("tpu", "fp32")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says with a T4 and an A100, both of which hold bf16, but only the second multiplies it."""
    capabilities = {"cuda": (7, 5), "cuda:0": (7, 5), "cuda:1": (8, 0)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])


@pytest.mark.parametrize(
    ("device", "expected"),
    [("auto", ("cuda", "fp16")), ("cuda", ("cuda", "fp16")), ("cuda:0", ("cuda:0", "fp16")),
     ("cuda:1", ("cuda:1", "bf16"))],
)  # fmt: skip
def test_a_gpu_that_only_emulates_bf16_tunes_in_fp16(two_gpus: None, device: str, expected: tuple[str, str]) -> None:
    assert resolve_precision(device, "auto") == expected


def test_a_gpu_that_is_not_there_is_refused_with_the_last_that_is(two_gpus: None) -> None:
    with pytest.raises(BackendUnavailable, match=r"'cuda:2' was asked for, but the last GPU is cuda:1") as caught:
        resolve_precision("cuda:2", "fp32")
    assert "doctor" in (caught.value.hint or "")


def test_a_clip_of_another_shape_than_its_poses_is_refused(clip, tmp_path: Path) -> None:
    frames, poses = clip
    write_video(tmp_path / "turned.mp4", frames[:, :16], 25.0)
    with pytest.raises(PoseError, match=r"turned\.mp4 are 16x32, of another shape"):
        load_clip(tmp_path / "turned.mp4", poses, SIZE, slice(None))
