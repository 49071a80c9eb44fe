"""Configurations of the embedded base: an SD-format model a hundredth of Stable Diffusion 1.5's size.

Layer 4, training only; at run time the folder's own config.json files are read, as for any other base.
"""

from __future__ import annotations

from typing import Any

from posecrafter_rt.models.settings import BaseSettings

SIZE = (128, 160)  # height, width in pixels

VAE: dict[str, Any] = {
    "block_out_channels": (32, 64, 96),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 16,
    "sample_size": SIZE[1],
}

_DENOISER: dict[str, Any] = {
    "block_out_channels": (64, 128, 160),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": (2, 2, 4),  # diffusers' historical name: the number of heads (of 64 and 40 channels)
    "cross_attention_dim": 64,
    "norm_num_groups": 32,
}
UNET: dict[str, Any] = {
    **_DENOISER,
    "sample_size": SIZE[1] // 4,
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
CONTROLNET: dict[str, Any] = {
    **_DENOISER,
    "conditioning_embedding_out_channels": (16, 32, 64),  # two stride-2 convolutions: the VAE's factor of 4
}
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "projection_dim": 64,
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",  # weighs the noisy steps, which decide the pose, more than predicting noise does
    "timestep_spacing": "leading",
}

# Chosen by measurement on the demonstration's footage. A model this small learns a person with all its weights, and the
# person's colours with its decoder. It is weakest where the noise is strongest, so renders start below that.
SETTINGS = BaseSettings(
    size=SIZE, trainable=(".",), learning_rate=3e-4, steps=200, learning_rate_decay=True, shared_noise=0.5,
    decoder_steps=100, small_decoder_steps=400, inversion_substeps=5, strength=0.6,
)  # fmt: skip
