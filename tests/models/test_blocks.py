"""Residual and transformer blocks over a clip, against diffusers' blocks and a GroupNorm over the 5-D clip."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from posecrafter_rt.models import blocks
from posecrafter_rt.models.blocks import ClipContext, group_norm, per_frame, resnet_forward, transformer_forward

EXACT = {"rtol": 1e-4, "atol": 1e-5}


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _context(scope, groups=1, time_projections=None, text_kv=None) -> ClipContext:
    return ClipContext(groups, time_projections, text_kv, scope)


@pytest.mark.parametrize(("groups", "frames"), [(1, 1), (1, 5), (2, 3)])
def test_clip_scope_is_a_group_norm_over_the_clip_as_one_volume(groups: int, frames: int) -> None:
    norm = torch.nn.GroupNorm(4, 16)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    hidden_states = _random(groups * frames, 16, 3, 5) * 3 + 2
    volume = hidden_states.reshape(groups, frames, 16, 3, 5).transpose(1, 2)  # (g, c, f, h, w)
    expected = norm(volume).transpose(1, 2).reshape(hidden_states.shape)
    torch.testing.assert_close(group_norm(norm, hidden_states, _context("clip", groups)), expected, **EXACT)


def test_frame_scope_is_the_plain_group_norm() -> None:
    norm, hidden_states = torch.nn.GroupNorm(4, 16), _random(6, 16, 3, 5)
    assert torch.equal(group_norm(norm, hidden_states, _context("frame", 2)), norm(hidden_states))


def test_clip_scope_takes_its_statistics_in_float32() -> None:
    """In bf16 the squares of large activations would lose what sets frames apart."""
    norm = torch.nn.GroupNorm(4, 16).bfloat16()
    hidden_states = (_random(4, 16, 8, 8) * 2 + 100).bfloat16()
    found = group_norm(norm, hidden_states, _context("clip"))
    expected = group_norm(norm.float(), hidden_states.float(), _context("clip"))
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() <= expected.abs().max() * 2**-8


def test_per_frame_repeats_groups_and_lets_one_broadcast() -> None:
    values = torch.tensor([[1.0], [2.0]])
    assert per_frame(values, 6).squeeze(1).tolist() == [1, 1, 1, 2, 2, 2]
    assert per_frame(values[:1], 6) is not None and per_frame(values[:1], 6).shape == (1, 1)


@torch.no_grad()
def test_resnet_equals_diffusers(tiny_model) -> None:
    unet, embedding = tiny_model.unet, _random(1, 128)
    table = torch.cat([resnet.time_emb_proj(F.silu(embedding)) for resnet in unet.resnets()], dim=-1)
    for resnet in unet.resnets():
        hidden_states = _random(3, resnet.in_channels, 8, 8)
        expected = resnet(hidden_states, embedding.expand(3, -1))
        found = resnet_forward(resnet, hidden_states, _context("frame", time_projections=table))
        torch.testing.assert_close(found, expected, **EXACT)


@torch.no_grad()
def test_transformer_of_one_frame_equals_diffusers(tiny_base) -> None:
    from posecrafter_rt.models.loading import load_base

    unet, text = load_base(str(tiny_base)).unet, _random(1, 77, 32, seed=1)  # conv_temp is zero
    for block in (unet.down_blocks[0], unet.mid_block, unet.up_blocks[1]):
        model = block.attentions[0]
        hidden_states = _random(1, model.norm.num_channels, 8, 8)
        found = transformer_forward(model, hidden_states, _context("frame", text_kv=unet.text_kv(text)))
        expected = model(hidden_states, encoder_hidden_states=text).sample
        torch.testing.assert_close(found, expected, **EXACT)


@torch.no_grad()
def test_key_frame_and_temporal_attention_by_hand(tiny_model) -> None:
    """The block written out from METHOD's equations, frame by frame and position by position."""
    unet, frames, text = tiny_model.unet, 3, _random(1, 77, 32, seed=1)
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    hidden_states = _random(frames, 64, 32)

    def attend(attn, queries, keys):
        split = [tensor.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for tensor in
                 (attn.to_q(queries), attn.to_k(keys), attn.to_v(keys))]  # fmt: skip
        q, k, v = split
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2))

    from posecrafter_rt.models.blocks import transformer_block_forward

    found = transformer_block_forward(block, hidden_states, _context("frame", text_kv=unet.text_kv(text)))
    normalised = block.norm1(hidden_states)
    out = hidden_states + torch.cat([attend(block.attn1, frame[None], normalised[:1]) for frame in normalised])
    positions = normalised.transpose(0, 1)  # (position, frame, channel)
    out = out + block.conv_temp(attend(block.attn_temp, positions, positions)).transpose(0, 1)
    out = out + attend(block.attn2, block.norm2(out), text.expand(frames, -1, -1))
    torch.testing.assert_close(found, out + block.ff(block.norm3(out)), **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("tokens_at_once", [7, 100, 512])
@pytest.mark.parametrize("prompts", [1, 2])
def test_transformer_blocks_in_parts_are_the_whole(
    tiny_model, clip, predict, monkeypatch: pytest.MonkeyPatch, prompts: int, tokens_at_once: int
) -> None:
    """Three frames of 256 tokens for each prompt, parts that do not divide them, and some that are less than a frame."""
    model, inputs = tiny_model, {**clip(3 * prompts), "encoder_hidden_states": _random(prompts, 77, 32)}
    expected, sizes = predict(model, **inputs), list[int]()

    def watched(attention, *arguments):
        sizes.append(arguments[0].shape[:-1].numel())
        return attention(*arguments)

    for name in ("keyframe_attention", "temporal_attention"):
        monkeypatch.setattr(blocks, name, partial(watched, getattr(blocks, name)))
    for network in (model.unet, model.controlnet):
        for block in network.transformer_blocks():
            block.ff.register_forward_pre_hook(lambda module, given: sizes.append(given[0].shape[:-1].numel()))
    predict(model, **inputs)
    assert max(sizes) == 3 * prompts * 256
    sizes.clear()
    for network in (model.unet, model.controlnet):
        blocks.do_in_parts(network, tokens_at_once)
    torch.testing.assert_close(predict(model, **inputs), expected, **EXACT)
    assert max(sizes) <= max(tokens_at_once, 3 * prompts)  # at least one position of all frames


def test_where_gradients_flow_nothing_is_done_in_parts(tiny_model) -> None:
    """Parts are written into one tensor, which no gradient would come through."""
    block = tiny_model.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    hidden_states = _random(3, 64, 32).requires_grad_()
    context = _context("frame", text_kv=tiny_model.unet.text_kv(_random(1, 77, 32)))
    blocks.do_in_parts(block, 16)
    blocks.transformer_block_forward(block, hidden_states, context).sum().backward()
    assert hidden_states.grad is not None and hidden_states.grad.abs().min() > 0
