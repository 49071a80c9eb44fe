"""The inflated ControlNet against diffusers' own, and the kinds of it that are refused."""

from __future__ import annotations

import pytest
import torch
from diffusers import ControlNetModel

from posecrafter_rt.errors import ModelError
from posecrafter_rt.models.controlnet import VideoControlNet

EXACT = {"rtol": 1e-4, "atol": 1e-5}


def _run(controlnet, inputs, pose_embeddings, scale: float = 1.0):
    return controlnet(
        inputs["latents"], controlnet.time_projections(torch.tensor([7])),
        controlnet.text_kv(inputs["encoder_hidden_states"]), pose_embeddings, torch.tensor([scale]))  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 0.4])
@torch.no_grad()
def test_one_frame_equals_diffusers(scale: float, tiny_base, tiny_model, clip) -> None:
    inputs = clip(1)
    expected_down, expected_mid = ControlNetModel.from_pretrained(tiny_base / "controlnet").eval()(
        inputs["latents"], 7, inputs["encoder_hidden_states"], inputs["controlnet_cond"],
        conditioning_scale=scale, return_dict=False)  # fmt: skip
    controlnet = tiny_model.controlnet
    down, mid = _run(controlnet, inputs, controlnet.pose_embedding(inputs["controlnet_cond"]), scale)
    assert len(down) == len(expected_down)
    for found, expected in zip([*down, mid], [*expected_down, expected_mid], strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


@torch.no_grad()
def test_pose_embeddings_can_be_computed_once_a_pose(tiny_model, clip) -> None:
    """Embedding poses one at a time, before any step, equals embedding them as a clip."""
    controlnet, poses = tiny_model.controlnet, clip(3)["controlnet_cond"]
    apart = torch.cat([controlnet.pose_embedding(pose[None]) for pose in poses])
    torch.testing.assert_close(apart, controlnet.pose_embedding(poses), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_frames_see_the_key_frame_and_not_each_other(tiny_model, clip) -> None:
    """The ControlNet has no temporal attention: a frame's residuals depend on it and the key frame alone."""
    controlnet, inputs = tiny_model.controlnet, clip(3)
    poses = controlnet.pose_embedding(inputs["controlnet_cond"])
    down, mid = _run(controlnet, inputs, poses)
    pair = {**inputs, "latents": inputs["latents"][[0, 2]]}
    pair_down, pair_mid = _run(controlnet, pair, poses[[0, 2]])
    for found, expected in zip([*pair_down, pair_mid], [*down, mid], strict=True):
        torch.testing.assert_close(found, expected[[0, 2]], **EXACT)


@pytest.mark.parametrize("option", [{"global_pool_conditions": True}, {"controlnet_conditioning_channel_order": "bgr"}])
def test_other_kinds_are_refused(option: dict) -> None:
    with torch.device("meta"):
        other = ControlNetModel(
            block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",), layers_per_block=1,
            attention_head_dim=2, cross_attention_dim=8, norm_num_groups=8, **option)  # fmt: skip
    with pytest.raises(ModelError, match="not an openpose ControlNet") as raised:
        VideoControlNet(other)
    assert "lllyasviel/control_v11p_sd15_openpose" in raised.value.hint
