"""The networks of a folder in its own precision and in float32, one at a time."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.runs import untrained_checkpoint
from posecrafter_rt.avatar_networks import Networks
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.runtime.report import SegmentReport


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


def test_a_render_that_has_come_to_float32_stays_there(networks: Networks) -> None:
    adjustment = networks.widening("the inversion", 3, "fp16")
    assert adjustment["frame"] == 3 and adjustment["precision"] == "fp32"
    assert networks.needed(SegmentReport(), SegmentReport(adjustments=[adjustment])) == "fp32"
    shortened = {"frame": 4, "segment": 2, "overlap": 0, "reason": "memory ran out"}
    assert networks.needed(SegmentReport(adjustments=[shortened])) == "fp16"
    with pytest.raises(PoseCrafterError, match="the inversion is not finite in fp32"):
        networks.widening("the inversion", 3, "fp32")
