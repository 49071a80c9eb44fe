"""Finds what must stay in float32 if all else has 16 bits: puts one part at a time into 16 bits and compares renders.

Bench: `python -m bench.islands [--json FILE] [--quick] [--checkpoint demo/tuned.ckpt]` renders some of the demonstration's
unseen frames and writes results/islands.json and .md, or FILE and its .md. Every operation is computed in float32 and its
result is rounded, like units that multiply in 16 bits and sum in float32; no such hardware is needed. Weights are
rounded once. There are small differences from the graphs of `export/strong_types.py`: here a norm includes its scale
and bias, LayerNorm's scale and bias are rounded, and attention's scores and weights are not rounded unless they are
named. --quick renders two frames in three steps after 10 steps of tuning, and only prints unless --json is given.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from bench.footage import filmed_person, tune_person
from bench.report import new_parser, publish, quality_cell, table
from bench.runs import forget_inversions, psnr_unless_equal
from bench.timing import machine
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.demo.run import scores
from posecrafter_rt.engines import Engine
from posecrafter_rt.engines.torch import TorchEngine
from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.poses.keypoints import PoseSequence

Row = dict[str, Any]
Round = Callable[[Tensor], Tensor]
aten = torch.ops.aten

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
DENOISERS = ("controlnet", "unet", "pose_embedding")
ONCE = ("text_encoder", "prompt_kv", "time_tables")
NOT_FINITE = "not finite"
AUTOENCODER = ("vae_encoder", "vae_decoder")


def standardise(x: Tensor, dims: tuple[int, ...], eps: float, rounded: Round) -> Tensor:
    """Return (x - mean) / sqrt(variance + eps), with every step but the sums rounded."""
    centred = rounded(x - rounded(x.mean(dims, keepdim=True)))
    variance = rounded(rounded(centred * centred).mean(dims, keepdim=True))
    return rounded(centred * rounded(rounded(variance + eps).rsqrt()))


def group_norm(
    rounded: Round, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5, *_: bool
) -> Tensor:
    """Compute `aten.group_norm` with rounded steps."""
    own = standardise(x.reshape(len(x), groups, -1), (-1,), eps, rounded).reshape(x.shape)
    scale, shift = (channels.reshape(-1, *(1,) * (x.ndim - 2)) for channels in (weight, bias))
    return rounded(own * scale) + shift


def layer_norm(
    rounded: Round, x: Tensor, shape: list[int], weight: Tensor, bias: Tensor, eps: float = 1e-5, *_: bool
) -> Tensor:
    """Compute `aten.layer_norm` with rounded steps."""
    return rounded(standardise(x, tuple(range(-len(shape), 0)), eps, rounded) * weight) + bias


def attention(rounded: Round, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute `aten.scaled_dot_product_attention`, rounding scores and weights. mask: bool, or added to the scores."""
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
    """Rounds the result of every operation on float32 to `dtype`, and every step within the operations named in `low`.

    It needs inference mode, in which torch does not split those operations itself.
    largest: the largest finite magnitude before rounding. num_low: how many of the operations named in `low` ran.
    """

    def __init__(self, dtype: torch.dtype, low: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.dtype, self.low = dtype, dict(NORMS_AND_SOFTMAX[name] for name in low)
        self.largest, self.num_low = 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.low:
            self.num_low += 1
            result = self.low[func](self.rounded, *args, **kwargs)
        else:
            result = func(*args, **kwargs)
        if func.is_view and func.overloadpacket is not aten.to:  # by its schema `to` is a view, too
            return result
        return tree_map_only(Tensor, self._in_place if func._schema.is_mutable else self.rounded, result)

    def rounded(self, x: Tensor) -> Tensor:
        """Round float32 x to values that the type can hold; return other tensors unchanged."""
        if x.dtype != torch.float32 or not x.numel():
            return x
        self.largest = max(self.largest, float(x.abs().nan_to_num(0, 0, 0).max()))
        return rounded_to(self.dtype, x)

    def _in_place(self, x: Tensor) -> Tensor:
        return x.copy_(self.rounded(x))


def rounded_to(dtype: torch.dtype, x: Tensor) -> Tensor:
    """Round x, of any floating-point type, to values that `dtype` can hold."""
    return x.to(dtype).to(x.dtype)


class InSixteenBits:
    """A network whose weights, inputs and operations are rounded by a `Rounded`, or only its weights."""

    has_own_threads = False

    def __init__(self, engine: Engine, mode: Rounded, *, weights_alone: bool) -> None:
        assert isinstance(engine, TorchEngine)
        self.engine, self.spec, self.device = engine, engine.spec, engine.device
        self._mode, self._weights_alone = mode, weights_alone
        with torch.no_grad():
            for parameter in engine.module.parameters():
                parameter.copy_(rounded_to(mode.dtype, parameter))

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        if self._weights_alone:
            return self.engine(**inputs)
        given = {name: self._mode.rounded(tensor) for name, tensor in inputs.items()}
        with self._mode:
            return self.engine(**given)


class Variant(NamedTuple):
    """What is put into 16 bits: the networks, and the steps within the norms and softmax in `low`; or only weights."""

    networks: tuple[str, ...]
    low: tuple[str, ...] = ()
    weights_alone: bool = False


IN_FLOAT32 = Variant(())


def variants(precision: str) -> dict[str, Variant]:
    """Return what is compared, by name. "as built" is close to what engines in that type compute."""
    built = DENOISERS if precision == "fp16" else (*DENOISERS, *AUTOENCODER)
    return {
        "weights alone": Variant(built, weights_alone=True),
        "as built": Variant(built),
        **{f"and {name}": Variant(built, (name,)) for name in NORMS_AND_SOFTMAX},
        "and all three": Variant(built, tuple(NORMS_AND_SOFTMAX)),
        "and text, prompt and time tables": Variant((*built, *ONCE)),
        **({"and the autoencoder": Variant((*built, *AUTOENCODER))} if precision == "fp16" else {}),
    }


def render(
    path: Path, target: PoseSequence, steps: int, mode: Rounded | None = None, variant: Variant = IN_FLOAT32
) -> np.ndarray:
    """Render with a float32 engine in which `mode` rounds the networks of a variant; the inversion is computed anew.

    Returns: frames (N, H, W, 3) uint8. Raises: PoseCrafterError if they are not finite.
    """
    with Avatar.load(path) as avatar:
        forget_inversions(avatar)
        for name in variant.networks:
            assert mode is not None
            avatar.engines[name] = InSixteenBits(avatar.engines[name], mode, weights_alone=variant.weights_alone)
        frames = avatar.render(target, num_inference_steps=steps)
        assert avatar.last_report is not None and not avatar.last_report.adjustments  # else other networks were loaded
    return frames


def compare(path: Path, target: PoseSequence, truth: np.ndarray, steps: int) -> list[Row]:
    """Return a row for float32, and one for each variant of each type."""
    exact = render(path, target, steps)
    rows: list[Row] = [{"precision": "fp32", "variant": "", **scores(exact, truth)}]
    for precision, dtype in DTYPES.items():
        for name, variant in variants(precision).items():
            mode = Rounded(dtype, variant.low)
            row: Row = {"precision": precision, "variant": name}
            try:
                frames = render(path, target, steps, mode, variant)
            except PoseCrafterError as error:
                if NOT_FINITE not in str(error):
                    raise
                row["error"] = NOT_FINITE
            else:
                row |= {"psnr_to_exact": psnr_unless_equal(exact, frames), **scores(frames, truth)}
            rows.append({**row, "largest": mode.largest, "num_low": mode.num_low})
            print(rows[-1], flush=True)
    return rows


def markdown(document: Row) -> str:
    """Format the results as a table."""
    lines = [f"{document['num_frames']} unseen frames of the demonstration's footage, {document['steps']} steps; every operation "
             "computed in float32 and rounded. As built: norms and softmax are rounded only in what they give, as are the networks "
             "that engines in that type have in 16 bits (weights by component, those that make prompt and time tables among them). "
             "The rows below put one part more into 16 bits each, its sums excepted. Largest: the greatest number met; float16 "
             "ends at 65,504.", ""]  # fmt: skip
    cells = []
    for row in document["rows"]:
        quality = (row["error"], "", "") if "error" in row else (
            quality_cell(row, "psnr_to_exact"), f"{row['psnr']:.2f}", f"{row['ssim']:.4f}")  # fmt: skip
        largest = f"{row['largest']:,.0f}" if row.get("largest") else ""
        cells.append((row["precision"], row["variant"], *quality, largest))
    header = ("type", "in 16 bits", "PSNR to float32", "PSNR to the truth", "SSIM to the truth", "largest")
    return "\n".join(lines + table(header, cells))


def run(steps: int, stride: int, given: Path | None, is_quick: bool) -> Row:
    """Tune unless a checkpoint is given, build an engine, compare."""
    truth, target = filmed_person(stride).unseen
    with tempfile.TemporaryDirectory(prefix="islands-") as folder:
        checkpoint = tune_person(Path(folder) / "tuned.ckpt", given, is_quick=is_quick)
        built = build_engine(checkpoint, Path(folder) / "tuned.engine", BuildOptions("torch", "fp32")).folder
        rows = compare(built.path, target, truth, steps)
    return {"machine": machine(), "steps": steps, "num_frames": len(target), "rows": rows}


def main() -> None:
    """Parse the arguments, measure, print, write both files."""
    parser = new_parser(__doc__, "two frames and few steps, hardly tuned")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint of `make demo`, instead of tuning anew")
    arguments = parser.parse_args()
    steps, stride = (3, 40) if arguments.quick else (10, 15)
    document = run(steps, stride, arguments.checkpoint, arguments.quick)
    publish("islands", document, markdown(document), arguments.json, arguments.quick)


if __name__ == "__main__":
    main()
