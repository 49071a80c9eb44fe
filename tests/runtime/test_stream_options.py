"""What a stream may be told, and the render whose sampling does its steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.method import DPMSchedule
from posecrafter_rt.runtime.live import LiveOptions
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.runtime.stream_options import StreamOptions
from tests.conftest import SCHEDULER


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 9}, {"window": -1}, {"window": 31}])
def test_beyond_the_bounds_is_refused(options: dict[str, int]) -> None:
    (value,) = options.values()
    with pytest.raises(PoseCrafterError, match=str(value)) as error:
        StreamOptions(**options)  # type: ignore[arg-type]
    assert error.value.hint in ("give 1 to 8", "give 0 to 30")


@pytest.mark.parametrize(("steps", "total"), [(1, 1), (2, 3), (3, 5), (4, 6), (5, 8), (8, 13)])
def test_steps_are_those_that_a_partial_inversion_leaves(steps: int, total: int) -> None:
    options = StreamOptions(steps=steps).as_render(0.6, has_small_decoder=False)
    assert (options.num_inference_steps, options.strength, options.sampler) == (total, 0.6, "dpmpp")
    assert options.num_inference_steps - options.start_step == steps
    own = StreamOptions(steps=steps, strength=1.0).as_render(0.6, has_small_decoder=False)
    assert (own.num_inference_steps, own.start_step) == (steps, 0)


def test_the_steps_of_one_stream_start_at_the_noise_that_its_strength_asks_for() -> None:
    schedule, starts = DPMSchedule.from_config(SCHEDULER), []
    for steps in (1, 2, 4, 8):
        options = StreamOptions(steps=steps, strength=0.2).as_render(1.0, has_small_decoder=False)
        assert options.num_inference_steps - options.start_step == steps
        starts.append(int(schedule.timesteps(options.num_inference_steps)[options.start_step]))
    assert max(starts) < 300, starts
    with pytest.raises(PoseCrafterError, match="no schedule has 1 steps at strength 0.0005"):
        StreamOptions(strength=0.0005, steps=1).as_render(1.0, has_small_decoder=False)


def test_a_strength_that_leaves_too_few_steps_is_refused() -> None:
    with pytest.raises(PoseCrafterError, match="no schedule has 8 steps at strength 0.001"):
        StreamOptions(steps=8, strength=0.001).as_render(1.0, has_small_decoder=False)


@pytest.mark.parametrize(("decoder", "has_small", "used"), [
    (None, True, "small"), (None, False, "full"), ("full", True, "full")])  # fmt: skip
def test_the_small_decoder_is_taken_where_there_is_one(decoder: str | None, has_small: bool, used: str) -> None:
    assert StreamOptions(decoder=decoder).as_render(1.0, has_small).decoder == used  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [StreamOptions, RenderOptions])
def test_regions_come_in_anything_but_one_name(options: type[StreamOptions] | type[RenderOptions]) -> None:
    assert options(regions=["face", "left_hand"]).regions == ("face", "left_hand")  # type: ignore[arg-type]
    for regions, message in (
        ("face", "regions are 'face', one name"),
        (["face", "tail"], "unknown region 'tail'"),
        (["face", "face"], "named twice"),
    ):
        with pytest.raises(PoseCrafterError, match=message):
            options(regions=regions)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"steps": 2.5}, {"window": 1.5}, {"unet_every": 1.5}])
def test_what_is_counted_is_whole(options: dict[str, Any]) -> None:
    with pytest.raises(PoseCrafterError):
        StreamOptions(**options)
    with pytest.raises(PoseCrafterError, match="an overlap of -1 frames"):
        RenderOptions(overlap=-1)
    with pytest.raises(PoseCrafterError, match=r"4\.5 denoising steps"):
        RenderOptions(num_inference_steps=4.5)  # type: ignore[arg-type]


def test_numbers_of_any_library_become_pythons_own() -> None:
    """For options are hashed, and written as JSON."""
    given = RenderOptions(num_inference_steps=np.int64(12), segment=np.int64(24), conditioning_scale=np.float32(0.5))  # type: ignore[arg-type]
    assert given == RenderOptions(num_inference_steps=12, segment=24, conditioning_scale=0.5)
    live = StreamOptions(steps=np.int32(3), strength=np.float64(0.6))  # type: ignore[arg-type]
    for options in (given, live):
        assert {type(value) for value in vars(options).values()} <= {
            int,
            float,
            str,
            bool,
            tuple,
            type(None),
            LiveOptions,
        }
