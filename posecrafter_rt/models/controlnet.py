"""The inflated ControlNet: pose pictures → residuals for the U-Net, with key-frame attention.

Layer 3: only the U-Net has temporal attention.
"""

from __future__ import annotations

from diffusers import ControlNetModel
from torch import Tensor, nn

from posecrafter_rt.errors import ModelError
from posecrafter_rt.models.blocks import NormScope, StreamMemory
from posecrafter_rt.models.unet import ClipDenoiser


class VideoControlNet(ClipDenoiser):
    """ControlNet 1.1 over a clip. Pose embeddings are computed separately, once per pose."""

    controlnet_down_blocks: nn.ModuleList

    def __init__(self, image_controlnet: ControlNetModel, norm_scope: NormScope = "frame") -> None:
        super().__init__(image_controlnet, norm_scope)
        config = image_controlnet.config
        if config.global_pool_conditions or config.controlnet_conditioning_channel_order != "rgb":
            raise ModelError("this ControlNet pools its condition or reads BGR: it is not an openpose ControlNet 1.1",
                             "use lllyasviel/control_v11p_sd15_openpose or a ControlNet of its kind")  # fmt: skip

    def pose_embedding(self, controlnet_cond: Tensor) -> Tensor:
        """Convolve pose pictures down to latent size. (F, 3, H, W) in [0, 1] → (F, C, h, w)."""
        return self.controlnet_cond_embedding(controlnet_cond)

    def forward(
        self,
        latents: Tensor,
        time_projections: Tensor,
        text_kv: Tensor,
        pose_embeddings: Tensor,
        conditioning_scale: Tensor,
        *,
        memory: StreamMemory | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Return the residuals for the U-Net.

        Args: latents: (G·F, 4, h, w). time_projections, text_kv, memory: as in `VideoUNet.predict`, for this network.
            pose_embeddings: (G·F, C, h, w) from `pose_embedding`. conditioning_scale: (1,) weight of the residuals.
        Returns: down_block_res_samples, mid_block_res_sample.
        """
        context = self._context(latents, time_projections, text_kv, memory)
        samples = self._down(self.conv_in(latents) + pose_embeddings, context)
        mid = self.controlnet_mid_block(self._mid(samples[-1], context))
        residuals = [conv(sample) for conv, sample in zip(self.controlnet_down_blocks, samples, strict=True)]
        return [residual * conditioning_scale for residual in residuals], mid * conditioning_scale
