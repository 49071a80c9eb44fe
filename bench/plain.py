"""The baselines: ControlVideo's algorithm run plainly, and PoseCrafter as published, on eager diffusers modules.

Bench: throughput.py times them and ledger.py counts them. They use the same weights and mathematics as the runtime, but
are written separately on diffusers' own forward passes: a clip is the batch, and an attention processor does key-frame
and temporal attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from transformers import CLIPTextModel

from bench.runs import Stages
from posecrafter_rt.errors import ModelError
from posecrafter_rt.framing import transform_keypoints
from posecrafter_rt.method import DDIMSchedule, ddim_invert, ddim_sample, plan_edits, select_reference
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.models.unet import ClipDenoiser
from posecrafter_rt.ops import affine_warp_paste
from posecrafter_rt.poses.draw import draw_poses
from posecrafter_rt.poses.keypoints import PoseSequence

FRAMES_PER_DECODE = 4  # as in ControlVideo


class KeyframeProcessor:
    """Self-attention to frame 0 with temporal attention beside it, as published: K and V are projected for every frame.

    temporal: the block's attn_temp and conv_temp, or None if it has none. diffusers' block passes norm1's output to
    attn1 and adds its result to the residual stream. Temporal attention reads the same and is added to the same.
    """

    def __init__(self, temporal: tuple[Attention, nn.Linear] | None) -> None:
        self.temporal = temporal

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states: (F, L, C) → the same shape."""
        frames, tokens, _ = hidden_states.shape
        query, key, value = (project(hidden_states).reshape(frames, tokens, attn.heads, -1).transpose(1, 2)
                             for project in (attn.to_q, attn.to_k, attn.to_v))  # fmt: skip
        key, value = key[[0] * frames], value[[0] * frames]
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(frames, tokens, -1)
        out = attn.to_out[0](out)
        if self.temporal is None:
            return out
        attn_temp, conv_temp = self.temporal
        return out + conv_temp(attn_temp(hidden_states.transpose(0, 1)).transpose(0, 1))


class ClipGroupNorm(nn.GroupNorm):
    """GroupNorm of (F, C, h, w) over the clip as one 5-D tensor, as in ControlVideo's residual blocks."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states.transpose(0, 1)[None])[0].transpose(0, 1)


def to_diffusers(module: ClipDenoiser, cls: type) -> Any:
    """Return the diffusers network that our U-Net or ControlNet was inflated from, on the same weight tensors."""
    with torch.device("meta"):
        image_model = cls.from_config(dict(module.config))  # type: ignore[attr-defined]
    tensors = module.state_dict()
    image_model.load_state_dict({name: tensors[name] for name in image_model.state_dict()}, assign=True)
    return image_model.eval().requires_grad_(False)


def inflate(module: ClipDenoiser, cls: type) -> Any:
    """Do `to_diffusers`, and put the clip's attention and the network's GroupNorm scope into diffusers' blocks.

    Raises: ModelError for a folded model.
    """
    ours = dict(module.named_modules())
    if any(hasattr(block, "temporal_out") for block in ours.values()):
        raise ModelError("the model is folded, and the published algorithm is not", "load it again")
    network = to_diffusers(module, cls)
    for name, block in network.named_modules():
        if isinstance(block, BasicTransformerBlock):
            tuned: Any = ours[name]
            temporal = (tuned.attn_temp, tuned.conv_temp) if hasattr(tuned, "attn_temp") else None
            block.attn1.set_processor(KeyframeProcessor(temporal))  # type: ignore[arg-type]
        elif module.norm_scope == "clip" and isinstance(block, ResnetBlock2D):
            block.norm1.__class__ = block.norm2.__class__ = ClipGroupNorm
    if module.norm_scope == "clip" and hasattr(network, "conv_norm_out"):
        network.conv_norm_out.__class__ = ClipGroupNorm
    return network


@dataclass(frozen=True)
class Networks:
    """The four networks of a baseline."""

    unet: UNet2DConditionModel
    controlnet: ControlNetModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel

    @classmethod
    def of(cls, model: PoseModel) -> Networks:
        """Return those of an unfolded model, on its weights. Raises: ModelError for a folded one."""
        unet, controlnet = inflate(model.unet, UNet2DConditionModel), inflate(model.controlnet, ControlNetModel)
        return cls(unet, controlnet, model.vae, model.text_encoder)

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Encode a prompt: (1, tokens) → (1, tokens, D)."""
        return self.text_encoder(input_ids).last_hidden_state

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (F, 3, H, W) in [-1, 1] → latents (F, 4, h, w), the posterior's mode."""
        return self.vae.encode(pixels).latent_dist.mode() * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (F, 4, h, w) → pixels (F, 3, H, W), about [-1, 1]."""
        return self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]

    def predict(
        self, latents: Tensor, timestep: Tensor | int, text: Tensor, pictures: Tensor, scale: float = 1.0
    ) -> Tensor:
        """Predict the noise of one step, computing everything anew: pose embedding, text K and V, timestep projections.

        Args: latents: (F, 4, h, w); text: (1, tokens, D); pictures: (F, 3, H, W) in [0, 1]; scale: of the residuals.
        """
        text = text.expand(len(latents), -1, -1)
        down, mid = self.controlnet(latents, timestep, encoder_hidden_states=text, controlnet_cond=pictures,
                                    conditioning_scale=scale, return_dict=False)  # fmt: skip
        return self.unet(latents, timestep, encoder_hidden_states=text, down_block_additional_residuals=down,
                         mid_block_additional_residual=mid, return_dict=False)[0]  # fmt: skip


@dataclass(frozen=True)
class Rendered:
    """frames: (N, H, W, 3) uint8. latents: (F, 4, h, w) float32, with an inserted frame, at 0. seconds: by stage."""

    frames: np.ndarray
    latents: Tensor
    seconds: dict[str, float]


class Baseline:
    """Renders a tuned person in the plain ways, on the device and in the dtype of the model's weights; no guidance.

    prompt: that of tuning; None: the base's. networks: a variant, such as compiled ones; None: the model's own.
    """

    def __init__(self, model: PoseModel, prompt: str | None = None, networks: Networks | None = None) -> None:
        self.model, self.prompt = model, model.settings.prompt if prompt is None else prompt
        self.networks = networks or Networks.of(model)
        self.schedule = DDIMSchedule.from_config(model.scheduler_config)
        weight = model.unet.conv_in.weight
        self.device, self.dtype = weight.device, weight.dtype

    @torch.inference_mode()
    def plain(
        self, frames: np.ndarray, poses: PoseSequence, target: PoseSequence, num_inference_steps: int = 50
    ) -> Rendered:
        """Run ControlVideo's algorithm as METHOD's mode `controlvideo`: training frame 0 is the reference.

        It inverts as many frames as it renders, jointly. They are copies of one frame, because METHOD starts every
        frame from the reference's latent, and a training clip need not be as long as the target. ControlVideo itself
        inverts the different frames of the source video, at the same cost and with another result.
        Args: frames: (n, H, W, 3) uint8; poses: their n poses; target: N poses on any canvas.
            num_inference_steps: in each direction.
        """
        stages, copies = Stages(), [0] * len(target)
        target = transform_keypoints(target, frames.shape[1:3])
        poses = transform_keypoints(poses, frames.shape[1:3])
        with stages("prepare"):
            text = self.encode_prompt()
        with stages("invert"):
            noise = self.invert(
                frames[copies], PoseSequence(poses.keypoints[copies], poses.canvas), text, num_inference_steps
            )
        with stages("prepare"):
            text, pictures = self.encode_prompt(), self.draw(target)
        with stages("denoise"):
            latents = self.sample(noise, pictures, text, num_inference_steps)
        with stages("decode"):
            rendered = np.stack(list(self.decode(latents)))
        return Rendered(rendered, latents.cpu(), stages.seconds)

    @torch.inference_mode()
    def published(
        self, frames: np.ndarray, poses: PoseSequence, target: PoseSequence, num_inference_steps: int = 50
    ) -> Rendered:
        """Run PoseCrafter as in its paper (mode `+editing`): one frame is inverted; everything else is as in `plain`.

        The inserted reference is decoded with the others, then dropped. Args: as for `plain`.
        """
        stages = Stages()
        target = transform_keypoints(target, frames.shape[1:3])
        poses = transform_keypoints(poses, frames.shape[1:3])
        with stages("prepare"):
            text, reference = self.encode_prompt(), select_reference(poses, target)
        with stages("invert"):
            pose = PoseSequence(poses.keypoints[[reference]], poses.canvas)
            noise = self.invert(frames[[reference]], pose, text, num_inference_steps)
        with stages("prepare"):
            text = self.encode_prompt()
            inserted = np.concatenate([poses.keypoints[[reference]], target.keypoints])
            pictures = self.draw(PoseSequence(inserted, target.canvas))
            edited = self.edit(noise[0], poses.keypoints[reference], target)
        with stages("denoise"):
            latents = self.sample(edited, pictures, text, num_inference_steps)
        with stages("decode"):
            rendered = np.stack(list(self.decode(latents))[1:])
        return Rendered(rendered, latents.cpu(), stages.seconds)

    def encode_prompt(self) -> Tensor:
        """Encode the tuning prompt: (1, tokens, D)."""
        return self.networks.encode_text(self.model.tokenize([self.prompt]).to(self.device))

    def draw(self, poses: PoseSequence) -> Tensor:
        """Draw pose pictures (N, 3, H, W) in [0, 1]."""
        pictures = torch.from_numpy(draw_poses(poses, poses.canvas)).permute(0, 3, 1, 2)
        return pictures.to(self.device, self.dtype).div(255)

    def invert(self, frames: np.ndarray, poses: PoseSequence, text: Tensor, num_inference_steps: int) -> Tensor:
        """Invert F frames of a clip with their F poses, jointly: (F, 4, h, w) float32."""
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).to(self.device)
        pixels = pixels.float().div(127.5).sub(1).to(self.dtype)
        latents = torch.cat([self.networks.encode(part) for part in pixels.split(FRAMES_PER_DECODE)]).float()
        pictures = self.draw(poses)
        return ddim_invert(self.denoiser(pictures, text), latents, self.schedule, num_inference_steps)

    def sample(self, noise: Tensor, pictures: Tensor, text: Tensor, num_inference_steps: int) -> Tensor:
        """Sample all frames of a clip jointly: (F, 4, h, w) float32."""
        return ddim_sample(self.denoiser(pictures, text), noise, self.schedule, num_inference_steps)

    def denoiser(self, pictures: Tensor, text: Tensor) -> Any:
        """Return the function that `ddim_invert` and `ddim_sample` call; their latents stay float32."""

        def denoise(latents: Tensor, index: int, timestep: int) -> Tensor:
            at = torch.tensor(timestep, device=self.device)  # a number would be compiled in, again for each step
            return self.networks.predict(latents.to(self.dtype), at, text, pictures).float()

        return denoise

    def edit(self, noise: Tensor, reference_pose: np.ndarray, target: PoseSequence) -> Tensor:
        """Edit the latents (method step 4), but not the inserted frame's: (4, h, w) → (N + 1, 4, h, w)."""
        height, width = noise.shape[-2:]
        plan = plan_edits(reference_pose, target.keypoints, canvas=target.canvas, latent_size=(height, width),
                          vae_scale_factor=target.canvas[0] // height)  # fmt: skip
        return affine_warp_paste(noise, torch.from_numpy(plan.affines), torch.from_numpy(plan.rects))

    def decode(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Decode to frames (H, W, 3) uint8."""
        for part in latents.to(self.dtype).split(FRAMES_PER_DECODE):
            pixels = self.networks.decode(part).float()
            frames = pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
            yield from frames.permute(0, 2, 3, 1).cpu().numpy()
