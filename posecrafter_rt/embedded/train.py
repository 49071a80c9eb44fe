"""Train the embedded base from nothing: `python -m posecrafter_rt.embedded.train OUTPUT`.

Layer 4, training only. It draws people, trains the autoencoder, then the denoiser, and writes an SD-format folder.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL, DDIMScheduler, ModelMixin
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer, PreTrainedModel

from posecrafter_rt.atomic import atomic_path
from posecrafter_rt.embedded.architecture import SCHEDULER, SETTINGS, SIZE
from posecrafter_rt.embedded.corpus import Clips, draw_clips, load_photographs
from posecrafter_rt.embedded.text import build_text_encoder, write_tokenizer
from posecrafter_rt.embedded.train_denoiser import Corpus, Denoiser, encode_corpus, train_denoiser
from posecrafter_rt.embedded.train_vae import train_vae
from posecrafter_rt.errors import OutputExists, PoseCrafterError
from posecrafter_rt.models.blocks import channels_last
from posecrafter_rt.models.loading import PoseModel, load_base
from posecrafter_rt.models.settings import SETTINGS_FILE, BaseSettings
from posecrafter_rt.tensor_file import save_tensors


def log(message: str) -> None:
    """Print progress to standard error, with the time of day."""
    print(time.strftime("%H:%M:%S"), message, file=sys.stderr, flush=True)


def save_network(folder: Path, model: ModelMixin | PreTrainedModel) -> None:
    """Write a network in half precision, as diffusers lays it out, without the path that it was read from."""
    deepcopy(model).half().save_pretrained(folder, safe_serialization=True)
    path = folder / "config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if name != "_name_or_path"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def save_base(folder: Path, denoiser: Denoiser, settings: BaseSettings) -> None:
    """Write unet/, controlnet/, text_encoder/ and scheduler/; `first_stages` has written vae/, which later runs use."""
    save_network(folder / "unet", denoiser.image_unet)
    save_network(folder / "controlnet", denoiser.image_controlnet)
    save_network(folder / "text_encoder", denoiser.text_encoder)
    DDIMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    index = {"_class_name": "StableDiffusionControlNetPipeline", "_diffusers_version": "0.30.0",
             "controlnet": ["diffusers", "ControlNetModel"], "scheduler": ["diffusers", "DDIMScheduler"],
             "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
             "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
             "feature_extractor": [None, None], "safety_checker": [None, None]}  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    (folder / SETTINGS_FILE).write_text(json.dumps(settings.to_json(), indent=2))


def kept(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors that an earlier run left in `path`; else make them and write them there."""
    if not path.exists():
        with atomic_path(path) as temporary:
            save_tensors(make(), temporary)
    return load_file(path)


def draw(num_clips: int, seed: int) -> dict[str, Tensor]:
    """Draw the people."""
    log(f"drawing {num_clips} people")
    return draw_clips(num_clips, 4, SIZE, seed).to_tensors()


def first_stages(
    output: Path, tokenizer: CLIPTokenizer, num_clips: int, seconds: float, seed: int, base: PoseModel | None = None
) -> Corpus:
    """Draw the people, train the autoencoder for `seconds`, encode the people; or use what an earlier run left.

    Args: base: whose denoiser is to be trained further, and so on the latents of its own autoencoder.
    """
    drawn = Clips.from_tensors(kept(output / "clips.safetensors", lambda: draw(num_clips, seed)))
    if not (output / "vae").exists():
        # Renamed when it is whole: diffusers writes the config before the weights.
        unfinished = output / ".vae.part"
        vae = base.vae if base is not None else train_vae(drawn, load_photographs(), seconds, seed, log)
        save_network(unfinished, vae)
        unfinished.rename(output / "vae")
    vae = AutoencoderKL.from_pretrained(output / "vae").eval()
    channels_last(vae)
    corpus = kept(output / "corpus.safetensors", lambda: vars(encode_corpus(drawn, vae, tokenizer, log)))
    return Corpus(**corpus)


def main(
    output: Annotated[Path, typer.Argument(help="folder to write; it also keeps the stages' results")],
    clips: Annotated[int, typer.Option(help="identities to draw")] = 6000,
    vae_minutes: float = 20.0,
    denoiser_minutes: float = 70.0,
    seed: int = 0,
    norm_scope: str = "frame",
    start_from: Annotated[
        str | None, typer.Option(help="a base to go on with: its denoiser, and its autoencoder as it is")
    ] = None,
) -> None:
    """Train the embedded base. Finished stages are kept in OUTPUT and not repeated, but for the denoiser's.

    With --start-from OUTPUT the denoiser is trained further.
    """
    if start_from is None and (output / "unet").exists():
        raise OutputExists(f"{output} holds a trained denoiser, which one that is trained anew would replace",
                           f"train it further: --start-from {shlex.quote(str(output))}, or give another folder")  # fmt: skip
    settings = replace(SETTINGS, norm_scope=norm_scope)  # type: ignore[arg-type]  # checked there
    torch.set_flush_denormal(True)
    base = None if start_from is None else load_base(start_from)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(output / "tokenizer")
    corpus = first_stages(output, tokenizer, clips, vae_minutes * 60, seed, base)
    torch.manual_seed(seed)
    denoiser = Denoiser(build_text_encoder(tokenizer), settings.norm_scope)
    if base is not None:
        denoiser.start_from(base)
    trained = train_denoiser(
        corpus, denoiser, denoiser_minutes * 60, seed, log, lambda averaged: save_base(output, averaged, settings)
    )
    save_base(output, trained, settings)
    log(f"wrote {output}")


if __name__ == "__main__":
    try:
        typer.run(main)
    except PoseCrafterError as error:
        sys.exit(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""))
