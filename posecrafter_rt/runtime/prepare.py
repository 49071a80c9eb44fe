"""Everything that is computed once: tables and inversion per avatar and prompt, pose embeddings and edits per clip.

Layer 5. What every step computes from it is in `denoiser`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from posecrafter_rt.engines.base import Engine
from posecrafter_rt.method import DDIMSchedule, EditPlan, ddim_invert, plan_edits
from posecrafter_rt.ops import affine_warp_paste
from posecrafter_rt.poses.draw import draw_poses
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.runtime.denoiser import Denoiser, Tables
from posecrafter_rt.runtime.options import RenderOptions, Resample


@dataclass(frozen=True)
class Prepared:
    """What depends only on the avatar, its reference frame and the options. All segments of a render share it.

    inverted_latents: (4, h, w). pose: (134, 3), the reference's, on a canvas of the frame size. pose_embedding: of that
    pose, (1, C, h, w).
    """

    tables: Tables
    inverted_latents: Tensor
    pose: np.ndarray
    pose_embedding: Tensor


@dataclass(frozen=True)
class Clip:
    """What depends on the pose sequence as well.

    latents: (F, 4, h, w), frame 0 is the key frame. pose_embeddings: (F, C, h, w). plan: the edits; None without edits.
    """

    latents: Tensor
    pose_embeddings: Tensor
    plan: EditPlan | None


def time_tables(engines: Mapping[str, Engine], timesteps: np.ndarray) -> dict[str, Tensor]:
    """Compute `Tables.time_projections` of `timesteps` (int64, noisiest first)."""
    tables = engines["time_tables"](timesteps=torch.from_numpy(timesteps))
    return {name: tables[f"{name}_time_projections"].clone() for name in ("unet", "controlnet")}


def text_tables(engines: Mapping[str, Engine], input_ids: Tensor) -> dict[str, Tensor]:
    """Compute `Tables.text_kv`, the keys and values of `input_ids` (G, tokens)."""
    text = engines["text_encoder"](input_ids=input_ids)["encoder_hidden_states"]
    tables = engines["prompt_kv"](encoder_hidden_states=text)
    return {name: tables[f"{name}_text_kv"].clone() for name in ("unet", "controlnet")}


def embed_poses(
    engines: Mapping[str, Engine], poses: PoseSequence, size: tuple[int, int], before: Sequence[Tensor] = ()
) -> Tensor:
    """Draw poses at `size` and embed them one at a time, as `decode` does with frames.

    before: embeddings (1, C, h, w) to put in front.
    Returns: (len(before) + len(poses), C, h, w), contiguous.
    """
    pictures = torch.from_numpy(draw_poses(poses, size)).permute(0, 3, 1, 2)
    embed = engines["pose_embedding"]
    embeddings: Tensor | None = None
    for index, part in enumerate(pictures.split(1), start=len(before)):
        embedded = embed(controlnet_cond=part.to(embed.device).float().div_(255))["pose_embeddings"]
        if embeddings is None:  # made once their size is known, so that none is held twice
            embeddings = embedded.new_empty(len(before) + len(pictures), *embedded.shape[1:])
        embeddings[index] = embedded[0]
    assert embeddings is not None  # a PoseSequence is never empty
    for index, embedded in enumerate(before):
        embeddings[index] = embedded[0]
    return embeddings


def frame_latents(engines: Mapping[str, Engine], frame: np.ndarray) -> Tensor:
    """Encode a frame, (H, W, 3) uint8, into latents (1, 4, h, w)."""
    pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float().div(127.5).sub(1)
    return engines["vae_encoder"](pixels=pixels)["latents"].clone()


def invert_reference(
    engines: Mapping[str, Engine],
    schedule: DDIMSchedule,
    tables: Tables,
    latents: Tensor,
    pose_embedding: Tensor,
    options: RenderOptions,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Invert the reference frame to noise (Eq. 4). It is one frame, whatever the clip's length.

    Args: latents: of the frame, (1, 4, h, w). pose_embedding: (1, C, h, w). tables: of the *source* prompt and the
        inversion's timesteps. options: with nothing left to the base. progress: called with (steps done, steps).
    Returns: inverted_latents (4, h, w).
    """
    denoise = Denoiser(engines, tables, pose_embedding, options.conditioning_scale, 1.0)
    assert options.inversion_substeps is not None
    return ddim_invert(denoise, latents, schedule, options.num_inference_steps, substeps=options.inversion_substeps,
                       start_step=options.start_step, progress=progress)[0]  # fmt: skip


def prepare_clip(
    engines: Mapping[str, Engine], prepared: Prepared, target: PoseSequence, options: RenderOptions
) -> Clip:
    """Compute what no denoising step changes: insertion, pose embeddings and latent edit of a clip.

    Args: target: N poses on a canvas of the frame size.
    """
    inserted = [prepared.pose_embedding] if options.inserts else []  # the reference's pose goes first (method step 3)
    pose_embeddings = embed_poses(engines, target, target.canvas, inserted)
    if not options.edits:
        latents = prepared.inverted_latents.expand(len(pose_embeddings), -1, -1, -1).contiguous()
        return Clip(latents, pose_embeddings, None)
    latents, plan = edit_latents(
        prepared.inverted_latents, prepared.pose, target, options, is_late=options.tau > 1)  # fmt: skip
    return Clip(latents, pose_embeddings, plan)


class EditOptions(Protocol):
    """The options of a render or stream that the latent edit reads."""

    @property
    def regions(self) -> tuple[str, ...]: ...

    @property
    def resample(self) -> Resample: ...


def edit_latents(
    inverted_latents: Tensor, reference_pose: np.ndarray, target: PoseSequence, options: EditOptions, *,
    is_late: bool = False,
) -> tuple[Tensor, EditPlan]:  # fmt: skip
    """Make the initial latents of the reference and N targets, and move face and hands of the targets (method step 4).

    Args: inverted_latents: (4, h, w). reference_pose, target: on a canvas of the frame size. is_late: only plan; each
        frame's own latents are edited at a later step.
    Returns: latents (1 + N, 4, h, w), the reference first, and the plan.
    """
    latent_size = (inverted_latents.shape[-2], inverted_latents.shape[-1])
    plan = plan_edits(
        reference_pose, target.keypoints, canvas=target.canvas, vae_scale_factor=target.canvas[0] // latent_size[0],
        latent_size=latent_size, regions=options.regions)  # fmt: skip
    rects = np.zeros_like(plan.rects) if is_late else plan.rects
    latents = affine_warp_paste(
        inverted_latents, torch.from_numpy(plan.affines), torch.from_numpy(rects), options.resample)  # fmt: skip
    return latents, plan
