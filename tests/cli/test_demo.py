"""The demonstration on its real footage and the embedded base, as short as it can be; and the engine that it leaves.

Tests of posecrafter_rt/demo/ and cli/demo.py: the whole path with nothing in it made smaller but steps and frames.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from posecrafter_rt.avatar import Avatar
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.cli.main import app
from posecrafter_rt.demo import run as demo
from posecrafter_rt.demo.footage import load_poses
from posecrafter_rt.engines.folder import PASSED_OVER
from posecrafter_rt.errors import OutputExists, PoseCrafterError
from posecrafter_rt.tuning import TuneOptions
from posecrafter_rt.video_io import read_video
from tests.test_lean_import import modules_after

NUM_FRAMES = 3
SHORT = ("--tuning-steps", "1", "--decoder-steps", "1", "--small-decoder-steps", "1", "--steps", "3")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A demonstration that was interrupted after its tuning and then run again, and the metrics that it printed."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TARGET", slice(46, 46 + NUM_FRAMES))

        def interrupted(*arguments: object, **options: object) -> None:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as first:
            first.setattr("posecrafter_rt.tuning.load_base", interrupted)
            result = invoke("demo", "-o", folder, *SHORT)
            assert result.exit_code == 130 and "run the same command again to start over" in result.stderr
        with pytest.MonkeyPatch.context() as first:
            first.setattr(demo, "build_engine", interrupted)
            result = invoke("demo", "-o", folder, *SHORT)
            assert result.exit_code == 130 and "run the same command again to go on" in result.stderr
        assert [path.name for path in folder.iterdir()] == ["tuned.ckpt"]
        patch.setattr(demo, "tune", None)  # tuned already
        result = invoke("demo", "-o", folder, *SHORT, "--json")
        assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout)


def test_it_writes_what_it_names_and_measures(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = finished
    names = {"tuned.ckpt", "tuned.engine", "out.mp4", "out.report.json", "contact_sheet.png", "side_by_side.mp4",
             "controlvideo.mp4", "metrics.json"}  # fmt: skip
    assert {path.name for path in folder.iterdir()} == names
    assert metrics == json.loads((folder / "metrics.json").read_text())
    for clip in ("render", "controlvideo", "repeated_reference"):
        assert 5 < metrics[clip]["psnr"] < 40 and 0 < metrics[clip]["ssim"] < 1
    assert set(metrics["seconds"]) == {"tune", "build", "render"} and metrics["peak_rss_bytes"] > 1e8
    assert (
        len(read_video(folder / "out.mp4").frames) == len(read_video(folder / "side_by_side.mp4").frames) == NUM_FRAMES
    )


def test_a_complete_one_is_not_overwritten_unasked(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    before = (folder / "metrics.json").read_bytes()
    result = invoke("demo", "-o", folder, *SHORT)
    assert result.exit_code == 1 and "--force" in result.output
    assert (folder / "metrics.json").read_bytes() == before


@pytest.mark.parametrize(
    "name", ["out.mp4", "out.png", "out.report.json", "contact_sheet.png", "side_by_side.mp4", "controlvideo.mp4",
             "tuned.engine", "tuned.ckpt", "metrics.json"],
)  # fmt: skip
def test_files_of_the_user_are_not_replaced_unasked(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputExists, match=f"/{name} ") as caught:
        demo.Demo(tmp_path, 3, TuneOptions(), force=False)
    assert "--force" in (caught.value.hint or "")
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_more_steps_than_the_noise_schedule_has_are_refused_before_anything_is_tuned(tmp_path: Path) -> None:
    with pytest.raises(PoseCrafterError, match=r"1000 denoising steps with offset 1 start at timestep 1000"):
        demo.Demo(tmp_path / "out", 1000, TuneOptions(), force=False)
    assert not (tmp_path / "out").exists()
    demo.Demo(tmp_path / "out", 999, TuneOptions(), force=False)


@pytest.mark.parametrize("steps", [1, 2])
def test_steps_that_would_do_nothing_are_refused_before_anything_is_tuned(tmp_path: Path, steps: int) -> None:
    with pytest.raises(
        PoseCrafterError, match=f"^{steps} denoising steps at strength 0.6 start where no noise is left"
    ):
        demo.Demo(tmp_path / "out", steps, TuneOptions(), force=False)
    assert not (tmp_path / "out").exists()


def test_only_its_own_checkpoint_is_rendered_unasked(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    short = TuneOptions(steps=1, decoder_steps=1, small_decoder_steps=1)
    shutil.copy(finished[0] / "tuned.ckpt", tmp_path)
    demo.Demo(tmp_path, 3, short, force=False)
    with pytest.raises(OutputExists, match=r"tuned\.ckpt was not tuned by this demonstration, or with other numbers"):
        demo.Demo(tmp_path, 3, replace(short, decoder_steps=2), force=False)
    other = Checkpoint.load(tmp_path / "tuned.ckpt")
    other.frames[0] = 0
    other.save(tmp_path / "tuned.ckpt", force=True)
    with pytest.raises(OutputExists, match="was not tuned by this demonstration"):
        demo.Demo(tmp_path, 3, short, force=False)


def test_a_tuning_that_was_interrupted_is_thrown_away_only_if_asked(tmp_path: Path) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    options = TuneOptions(steps=2, decoder_steps=0, small_decoder_steps=0)
    with pytest.raises(KeyboardInterrupt):
        demo.Demo(tmp_path, 3, options, force=False).tune(interrupted)
    steps: list[int] = []
    other = replace(options, steps=1)
    with pytest.raises(OutputExists, match="unfinished tuning"):
        demo.Demo(tmp_path, 3, other, force=False).tune(lambda step, of, label: steps.append(step))
    told = invoke(
        "demo", "-o", tmp_path, "--tuning-steps", 1, "--decoder-steps", 0, "--small-decoder-steps", 0, "--steps", 3
    )
    assert told.exit_code == 1 and "give --tuning-steps 2 to finish it" in told.stderr
    demo.Demo(tmp_path, 3, options, force=False).tune(lambda step, of, label: steps.append(step))
    assert steps == [2]


def test_one_that_is_done_anew_does_not_try_again_what_auto_has_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced: list[bool] = []
    monkeypatch.setattr(demo, "build_engine", lambda *arguments, force, progress: forced.append(force))
    run = demo.Demo(tmp_path, 3, TuneOptions(), force=True)
    run.build(lambda stage, seconds_left: None)
    run.engine.mkdir()
    (run.engine / PASSED_OVER).write_text("{}")
    run.build(lambda stage, seconds_left: None)
    assert forced == [True, False]


def test_a_second_render_inverts_and_compiles_nothing(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, poses = finished[0] / "tuned.engine", load_poses()[46 : 46 + NUM_FRAMES]
    with Avatar.load(engine) as avatar:
        assert avatar.folder.manifest["backend"] == "openvino"
        first = avatar.render(poses, num_inference_steps=3)
        assert avatar.last_report is not None and avatar.last_report.inversion_cached  # by the demonstration
    kept = sorted((engine / "compiled").iterdir())
    assert kept
    with Avatar.load(engine) as avatar:
        engine_class: Any = type(avatar.engines["unet"])
        monkeypatch.setattr(engine_class, "_read", None)  # what is compiled is read there first
        again = avatar.render(poses, num_inference_steps=3)
        assert avatar.last_report is not None and avatar.last_report.inversion_cached
    assert np.array_equal(first, again) and sorted((engine / "compiled").iterdir()) == kept


def test_rendering_imports_nothing_that_only_tuning_and_building_need(finished: tuple[Path, dict[str, Any]]) -> None:
    modules = modules_after(f"""
from posecrafter_rt import Avatar
from posecrafter_rt.demo.footage import load_poses
import posecrafter_rt.serve.app
with Avatar.load({str(finished[0] / "tuned.engine")!r}) as avatar:
    avatar.render(load_poses()[46:{46 + NUM_FRAMES}], num_inference_steps=3)
""")
    assert not modules & {"diffusers", "transformers", "onnx", "torch._dynamo", "torch._inductor", "sympy"}
    assert {"openvino", "tokenizers"} <= modules
