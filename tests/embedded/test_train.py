"""The recipe of the embedded base, in seconds: every stage runs, is kept, and ends in a base that loads.

Tests of posecrafter_rt/embedded/train.py and what it calls.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posecrafter_rt.embedded import corpus, train, train_denoiser, train_vae
from posecrafter_rt.embedded.architecture import SETTINGS, SIZE
from posecrafter_rt.embedded.corpus import Clips, draw_clips
from posecrafter_rt.embedded.text import write_tokenizer
from posecrafter_rt.errors import ModelError, OutputExists
from posecrafter_rt.models.loading import load_base, named_parameters
from posecrafter_rt.models.sources import EMBEDDED_FOLDER
from posecrafter_rt.poses.keypoints import NUM_KEYPOINTS

SECONDS = 0.5 / 60  # of each training stage, in minutes
BLANK = Clips(np.zeros((1, 1, *SIZE, 3), np.uint8), np.zeros((1, 1, NUM_KEYPOINTS, 3), np.float32), ["nobody"])


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """Training turns them off for its process; other tests want them."""
    yield
    torch.set_flush_denormal(False)


def test_clips_come_back_from_a_file(tmp_path: Path) -> None:
    clips = draw_clips(2, 2, (32, 40), seed=1)
    again = Clips.from_tensors(train.kept(tmp_path / "clips.safetensors", clips.to_tensors))
    assert np.array_equal(again.frames, clips.frames) and np.array_equal(again.keypoints, clips.keypoints)
    assert again.captions == clips.captions


def test_people_are_drawn_by_no_more_processes_than_a_quota_of_cores_pays_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool(ProcessPoolExecutor):
        def __init__(self, max_workers: int | None = None, **options: Any) -> None:
            started.append(max_workers)
            super().__init__(max_workers, **options)

    started: list[int | None] = []
    monkeypatch.setattr("posecrafter_rt.machine.core_quota", lambda root: 3)
    monkeypatch.setattr(corpus, "ProcessPoolExecutor", Pool)
    assert len(draw_clips(0, 2, (32, 40), seed=1).frames) == 0 and started == [3]


def test_the_demonstrations_footage_is_no_source() -> None:
    assert not any(
        "carphone" in name for names in (*corpus.PHOTOGRAPHS.values(), *corpus.VIDEOS.values()) for name in names
    )


def test_the_recipe_runs_keeps_its_stages_and_goes_on_from_a_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "load_photographs", list)  # they take longer to read than this trains
    monkeypatch.setattr(train_vae, "BATCH", 2)
    monkeypatch.setattr(train_denoiser, "CLIPS_PER_STEP", 1)
    train.main(tmp_path, clips=4, vae_minutes=SECONDS, denoiser_minutes=SECONDS)
    model = load_base(str(tmp_path))
    assert model.settings == SETTINGS
    assert all(bool(parameter.isfinite().all()) for _, parameter in named_parameters(model))
    monkeypatch.setattr(train, "draw_clips", None)  # drawn, encoded and trained already
    monkeypatch.setattr(train, "encode_corpus", None)
    monkeypatch.setattr(train, "train_vae", None)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "vae").iterdir()}  # else a kill could tear it
    train.main(tmp_path, clips=4, denoiser_minutes=SECONDS, start_from="embedded")
    embedded, further = load_base("embedded"), load_base(str(tmp_path))
    distance = (further.unet.conv_in.weight - embedded.unet.conv_in.weight).abs().max()
    assert 0 < distance < 0.05  # a step or two away from it, not anew
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "vae").iterdir()} == kept


def test_a_new_run_that_goes_on_from_a_base_trains_on_the_latents_of_its_autoencoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "train_vae", None)
    monkeypatch.setattr(train, "train_denoiser", lambda corpus, denoiser, *arguments: denoiser)  # it would take long
    train.kept(tmp_path / "clips.safetensors", BLANK.to_tensors)
    train.main(tmp_path, start_from="embedded")
    embedded, further = load_base("embedded").vae.state_dict(), load_base(str(tmp_path)).vae.state_dict()
    assert all(torch.equal(further[name], tensor) for name, tensor in embedded.items())


def test_a_denoiser_that_was_trained_is_not_replaced_by_one_that_is_trained_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command again trains no further: without a base to start from, weights are random."""
    monkeypatch.setattr(train, "draw_clips", None)
    trained = tmp_path / "a base"
    (trained / "unet").mkdir(parents=True)
    with pytest.raises(OutputExists, match="holds a trained denoiser") as caught:
        train.main(trained)
    assert caught.value.hint == f"train it further: --start-from '{trained}', or give another folder"
    assert [path.name for path in trained.iterdir()] == ["unet"]
    monkeypatch.setattr(train, "train_denoiser", lambda corpus, denoiser, *arguments: denoiser)  # it would take long
    train.kept(trained / "clips.safetensors", BLANK.to_tensors)
    train.main(trained, start_from="embedded")
    load_base(str(trained))


def test_the_commands_refusal_is_two_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unet").mkdir()
    monkeypatch.setattr(sys, "argv", ["train", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^error: .* holds a trained denoiser, .*\nhint: .*--start-from .*$"):
        runpy.run_path(train.__file__, run_name="__main__")


def test_a_base_does_not_say_in_which_folder_it_was_made(tmp_path: Path) -> None:
    model = train.AutoencoderKL(**train_vae.VAE)
    model.register_to_config(_name_or_path="/home/somebody/vae")
    train.save_network(tmp_path / "vae", model)
    for folder in (tmp_path, EMBEDDED_FOLDER):
        assert not any("_name_or_path" in path.read_text() for path in folder.rglob("config.json"))
    assert train.AutoencoderKL.from_pretrained(tmp_path / "vae").config.scaling_factor == model.config.scaling_factor


def test_an_autoencoder_that_was_saved_in_part_is_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load_photographs", list)
    monkeypatch.setattr(train_vae, "BATCH", 2)
    train.kept(tmp_path / "clips.safetensors", BLANK.to_tensors)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("safetensors.torch.save_file", interrupted)  # when diffusers has written the config
        train.first_stages(tmp_path, tokenizer, 1, 1e-9, 0)
    assert list(tmp_path.rglob("config.json"))
    train.first_stages(tmp_path, tokenizer, 1, 1e-9, 0)
    assert (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").is_file()


def test_an_unknown_scope_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="norm_scope"):
        train.main(tmp_path / "out", norm_scope="both")
    assert not (tmp_path / "out").exists()
