"""What must stay in float32 where all else has 16 bits: each part is put into 16 bits in turn, and whole renders are compared.

Bench: `python -m bench.islands [--json FILE] [--quick] [--checkpoint demo/tuned.ckpt]` renders some of the demonstration's
unseen frames and writes results/islands.json and .md, or FILE and its .md. Every operation is computed in float32 and its
result rounded, as by units that multiply in 16 bits and sum in float32, which needs no such units; weights are rounded once.
With --quick alone it only prints: two frames in two steps after 10 of tuning.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from bench.footage import load_footage, tune_person
from bench.report import add_output_arguments, publish, table
from bench.runs import forget_inversions, psnr
from bench.timing import machine
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.demo.footage import TARGET
from posecrafter_rt.demo.run import scores
from posecrafter_rt.engines.torch import TorchEngine
from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.poses.keypoints import PoseSequence

Row = dict[str, Any]
Round = Callable[[Tensor], Tensor]
aten = torch.ops.aten

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
DENOISERS = ("controlnet", "unet", "pose_embedding")
ONCE = ("text_encoder", "prompt_kv", "time_tables")
AUTOENCODER = ("vae_encoder", "vae_decoder")


def standardise(x: Tensor, dims: tuple[int, ...], eps: float, rounded: Round) -> Tensor:
    """(x - mean) / sqrt(variance + eps), each step but its sums rounded."""
    centred = rounded(x - rounded(x.mean(dims, keepdim=True)))
    variance = rounded(rounded(centred * centred).mean(dims, keepdim=True))
    return rounded(centred * rounded(rounded(variance + eps).rsqrt()))


def group_norm(
    rounded: Round, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5, *_: bool
) -> Tensor:
    """`aten.group_norm`."""
    own = standardise(x.reshape(len(x), groups, -1), (-1,), eps, rounded).reshape(x.shape)
    scale, shift = (channels.reshape(-1, *(1,) * (x.ndim - 2)) for channels in (weight, bias))
    return rounded(own * scale) + shift


def layer_norm(
    rounded: Round, x: Tensor, shape: list[int], weight: Tensor, bias: Tensor, eps: float = 1e-5, *_: bool
) -> Tensor:
    """`aten.layer_norm`."""
    return rounded(standardise(x, tuple(range(-len(shape), 0)), eps, rounded) * weight) + bias


def attention(rounded: Round, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`aten.scaled_dot_product_attention`, its scores and weights rounded. mask: bool, or added to the scores."""
    scores = rounded(rounded(q * q.shape[-1] ** -0.5) @ k.mT)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = rounded(rounded(scores - scores.amax(-1, keepdim=True)).exp())
    return rounded(weights / rounded(weights.sum(-1, keepdim=True))) @ v


NORMS_AND_SOFTMAX: dict[str, tuple[Any, Callable[..., Tensor]]] = {
    "GroupNorm": (aten.group_norm.default, group_norm),
    "LayerNorm": (aten.layer_norm.default, layer_norm),
    "softmax": (aten.scaled_dot_product_attention.default, attention),
}


class Rounded(TorchDispatchMode):
    """Rounds what every operation on float32 gives to `dtype`; the insides of those named in `low`, too; in inference mode,
    where torch does not take them apart itself.

    largest: the greatest magnitude that was finite. num_low: how many operations were of those named.
    """

    def __init__(self, dtype: torch.dtype, low: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.dtype, self.low = dtype, dict(NORMS_AND_SOFTMAX[name] for name in low)
        self.largest, self.num_low = 0.0, 0

    def rounded(self, x: Tensor) -> Tensor:
        """x, of the values that the type has."""
        return x.to(self.dtype).to(x.dtype) if x.dtype == torch.float32 else x

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.low:
            self.num_low += 1
            result = self.low[func](self.rounded, *args, **kwargs)
        else:
            result = func(*args, **kwargs)
        if func.is_view:
            return result
        return tree_map_only(Tensor, self._in_place if func._schema.is_mutable else self._kept, result)

    def _kept(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32 and x.numel():
            self.largest = max(self.largest, float(x.abs().nan_to_num(0, 0, 0).max()))
        return self.rounded(x)

    def _in_place(self, x: Tensor) -> Tensor:
        return x.copy_(self._kept(x))


class InSixteenBits:
    """A network whose weights, inputs and operations are rounded by a `Rounded`."""

    has_own_threads = False

    def __init__(self, engine: TorchEngine, mode: Rounded, *, weights_alone: bool) -> None:
        self.engine, self.spec, self.device = engine, engine.spec, engine.device
        self._mode, self._weights_alone = mode, weights_alone
        with torch.no_grad():
            for parameter in engine.module.parameters():
                parameter.copy_(mode.rounded(parameter))

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        if self._weights_alone:
            return self.engine(**inputs)
        given = {name: self._mode.rounded(tensor) for name, tensor in inputs.items()}
        with self._mode:
            return self.engine(**given)


def variants(precision: str) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """What is compared: the networks in 16 bits, and of norms and softmax those whose insides are, too.

    The first is rounded in its weights alone; the second is what `export/strong_types.py` writes into graphs.
    """
    built = DENOISERS if precision == "fp16" else (*DENOISERS, *AUTOENCODER)
    return {
        "weights alone": (built, ()),
        "as built": (built, ()),
        **{f"and {name}": (built, (name,)) for name in NORMS_AND_SOFTMAX},
        "and all three": (built, tuple(NORMS_AND_SOFTMAX)),
        "and text, prompt and time tables": ((*built, *ONCE), ()),
        **({"and the autoencoder": ((*built, *AUTOENCODER), ())} if precision == "fp16" else {}),
    }


def render(path: Path, target: PoseSequence, steps: int, mode: Rounded | None = None, networks: tuple[str, ...] = (),
           *, weights_alone: bool = False) -> np.ndarray:  # fmt: skip
    """Frames (N, H, W, 3) uint8 of an engine in float32 whose named networks compute by `mode`; all inverted anew."""
    with Avatar.load(path) as avatar:
        forget_inversions(avatar)
        avatar.networks.use("fp32")
        for name in networks:
            engine = avatar.engines[name]
            assert isinstance(engine, TorchEngine) and mode is not None
            avatar.networks.engines[name] = InSixteenBits(engine, mode, weights_alone=weights_alone)
        frames = avatar.render(target, num_inference_steps=steps)
        forget_inversions(avatar)
    return frames


def compare(path: Path, target: PoseSequence, truth: np.ndarray, steps: int) -> list[Row]:
    """A row for float32, and one for each variant of each type."""
    exact = render(path, target, steps)
    rows: list[Row] = [{"precision": "fp32", "variant": "", **scores(exact, truth)}]
    for precision, dtype in DTYPES.items():
        for name, (networks, low) in variants(precision).items():
            mode = Rounded(dtype, low)
            row: Row = {"precision": precision, "variant": name}
            try:
                frames = render(path, target, steps, mode, networks, weights_alone=name == "weights alone")
            except PoseCrafterError as error:
                row["error"] = error.message
            else:
                quality = psnr(exact, frames)
                row |= {"psnr_to_exact": quality if math.isfinite(quality) else None, **scores(frames, truth)}
            rows.append({**row, "largest": mode.largest, "num_low": mode.num_low})
            print(rows[-1], flush=True)
    return rows


def markdown(document: Row) -> str:
    """The results as a table."""
    lines = [f"{document['num_frames']} unseen frames of the demonstration's footage, {document['steps']} steps; every operation "
             "computed in float32 and rounded. As built: what engines in that type have in float32 is not rounded. The rows below "
             "put one part more into 16 bits each, its sums excepted. Largest: the greatest number met; float16 ends at "
             "65,504.", ""]  # fmt: skip
    cells = []
    for row in document["rows"]:
        if "error" in row:
            cells.append((row["precision"], row["variant"], row["error"], "", "", f"{row['largest']:,.0f}"))
            continue
        exact = (
            ""
            if "psnr_to_exact" not in row
            else "same"
            if row["psnr_to_exact"] is None
            else f"{row['psnr_to_exact']:.1f}"
        )
        largest = f"{row['largest']:,.0f}" if row.get("largest") else ""
        cells.append((row["precision"], row["variant"], exact, f"{row['psnr']:.2f}", f"{row['ssim']:.4f}", largest))
    header = ("type", "in 16 bits", "PSNR to float32", "PSNR to the truth", "SSIM to the truth", "largest")
    return "\n".join(lines + table(header, cells))


def run(steps: int, stride: int, given: Path | None, is_quick: bool) -> Row:
    """Tune unless a checkpoint is given, build, compare."""
    frames, poses = load_footage()
    window = slice(TARGET.start, TARGET.stop, stride)
    target, truth = poses[window], frames[window]
    with tempfile.TemporaryDirectory(prefix="islands-") as folder:
        checkpoint = tune_person(Path(folder) / "tuned.ckpt", given, is_quick=is_quick)
        built = build_engine(checkpoint, Path(folder) / "tuned.engine", BuildOptions("torch", "fp32")).folder
        rows = compare(built.path, target, truth, steps)
    return {"machine": machine(), "steps": steps, "num_frames": len(target), "rows": rows}


def main() -> None:
    """Parse the arguments, measure, print, write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint of `make demo`, instead of tuning anew")
    add_output_arguments(parser, "two frames and steps, hardly tuned")
    arguments = parser.parse_args()
    steps, stride = (2, 40) if arguments.quick else (10, 15)
    document = run(steps, stride, arguments.checkpoint, arguments.quick)
    publish("islands", document, markdown(document), arguments.json, arguments.quick)


if __name__ == "__main__":
    main()
