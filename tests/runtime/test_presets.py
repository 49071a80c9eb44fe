"""Presets: what they bundle, what overrules them, and what a render names as approximated."""

from __future__ import annotations

from dataclasses import replace

import pytest

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.runtime.presets import PRESETS, STREAM_PRESETS, approximations, bundle, preset_options
from posecrafter_rt.runtime.stream_options import StreamOptions


def test_exact_is_the_defaults_and_the_first() -> None:
    assert preset_options("exact") == RenderOptions()
    assert next(iter(PRESETS)) == "exact"


def test_each_preset_does_fewer_steps_than_the_one_before() -> None:
    steps = [preset_options(name).num_inference_steps for name in PRESETS]
    assert steps == sorted(steps, reverse=True) and len(set(steps)) == len(steps)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "exact"])
def test_what_is_given_overrules_the_preset(preset: str) -> None:
    options = preset_options(preset, num_inference_steps=50, mode="+insertion")
    assert (options.num_inference_steps, options.mode) == (50, "+insertion")
    assert options.sampler == preset_options(preset).sampler
    assert preset_options(preset, sampler="ddim").sampler == "ddim"


def test_an_unknown_preset_or_sampler_is_refused_with_the_names_of_those_there_are() -> None:
    with pytest.raises(PoseCrafterError, match="unknown preset 'quick'") as error:
        preset_options("quick")
    assert error.value.hint is not None and "balanced" in error.value.hint
    with pytest.raises(PoseCrafterError, match="unknown sampler 'euler'"):
        RenderOptions(sampler="euler")  # type: ignore[arg-type]


def test_presets_of_streams_do_more_from_one_to_the_next_and_the_middle_one_is_the_defaults() -> None:
    options = {name: StreamOptions(**bundle(name, STREAM_PRESETS)) for name in STREAM_PRESETS}
    assert {name: (stream.steps, stream.window, stream.decoder) for name, stream in options.items()} == {
        "fast": (1, 2, None), "balanced": (2, 2, None), "quality": (4, 2, "full")}  # fmt: skip
    assert options["balanced"] == StreamOptions()
    assert all(replace(stream, is_pipelined=True) for stream in options.values())


@pytest.mark.parametrize(("options", "segment", "named"), [
    (RenderOptions(strength=1.0), None, {}),
    (RenderOptions(strength=1.0, num_inference_steps=100), None, {}),
    (RenderOptions(strength=1.0, segment=48), None, {}),  # the clip fitted into one
    (RenderOptions(strength=1.0, segment=48), 48, {"segment": 48}),
    (RenderOptions(strength=1.0), 24, {"segment": 24}),  # memory did not suffice for a joint render
    (RenderOptions(strength=0.6), None, {"strength": 0.6}),
    (RenderOptions(strength=1.0, controlnet_every=3, sampler="unipc"), None, {"controlnet_every": 3, "sampler": "unipc"}),
    (RenderOptions(strength=1.0, unet_every=2), None, {"unet_every": 2}),
    (RenderOptions(strength=1.0, sampler="dpmpp", num_inference_steps=10), None,
     {"num_inference_steps": 10, "sampler": "dpmpp"}),
])  # fmt: skip
def test_what_is_approximated_is_named(options: RenderOptions, segment: int | None, named: dict) -> None:
    assert approximations(options, segment, "fp32") == named


@pytest.mark.parametrize(("precision", "named"), [
    ("fp32", {}), ("bf16", {}), ("fp16", {}), ("int8", {"precision": "int8"}),
])  # fmt: skip
def test_of_an_engines_precisions_eight_bits_are_named(precision: str, named: dict) -> None:
    assert approximations(RenderOptions(strength=1.0), None, precision) == named
