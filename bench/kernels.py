"""Times the three operators against the code that one would write without them, on the GPU if there is one.

Bench: `python -m bench.kernels` writes results/kernels-<device>.json and .md. Rooflines are from this machine's
measured peaks: the time that the bytes or the FLOPs would take at the speed of a copy or of a matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.report import name_by_device, new_parser, publish
from bench.timing import Timing, compare, machine, time_call, time_on_cpu
from bench.workloads import HEADS, Attention, attentions, paste_bytes
from posecrafter_rt.engines.base import TORCH_DTYPES
from posecrafter_rt.ops import BACKENDS, affine_warp_paste, keyframe_attention, temporal_attention, unsupported_reason
from posecrafter_rt.ops.reference import split_heads

Row = dict[str, Any]


def expanded_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute key-frame attention as image models do: repeat K and V for every frame, then call SDPA."""
    frames, tokens, channels = q.shape
    k, v = (tensor.repeat_interleave(frames // tensor.shape[0], 0) for tensor in (k, v))
    out = scaled_dot_product_attention(*(split_heads(tensor, HEADS) for tensor in (q, k, v)))
    return out.transpose(1, 2).reshape(frames, tokens, channels)


def transposed_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute temporal attention like image models: positions first, SDPA, back. One group's q, k, v are not copied."""
    groups, frames, tokens, channels = q.shape
    moved = [t.transpose(1, 2).reshape(groups * tokens, -1, channels) for t in (q, k, v)]
    out = scaled_dot_product_attention(*(split_heads(tensor, HEADS) for tensor in moved))
    out = out.transpose(1, 2).reshape(groups, tokens, frames, channels)
    return out.transpose(1, 2).contiguous()


def xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute key-frame attention with xformers' memory-efficient attention; K and V are repeated."""
    from xformers.ops import memory_efficient_attention

    frames, tokens, channels = q.shape
    k, v = (tensor.repeat_interleave(frames // tensor.shape[0], 0) for tensor in (k, v))
    heads_last = [tensor.reshape(*tensor.shape[:2], HEADS, channels // HEADS) for tensor in (q, k, v)]
    return memory_efficient_attention(*heads_last).reshape(frames, tokens, channels)


def attention_inputs(problem: Attention, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return random q, k and v of one group, contiguous."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    rows = (problem.tokens, problem.channels)
    if problem.op == "keyframe_attention":
        keys = (1, problem.num_keys, problem.channels)
        return normal(problem.frames, *rows), normal(*keys), normal(*keys)
    clip = (1, problem.num_keys, *rows)
    return normal(1, problem.frames, *rows), normal(*clip), normal(*clip)


def attention_calls(problem: Attention, dtype: torch.dtype, device: str) -> dict[str, Callable[[], Tensor]]:
    """Return the contenders for one problem; ours is named after the backend that it takes."""
    q, k, v = attention_inputs(problem, dtype, device)
    if problem.op == "keyframe_attention":
        calls = {
            f"ours ({chosen(problem.op, q, k, v)})": lambda: keyframe_attention(q, k, v, HEADS),
            "torch SDPA, K and V expanded": lambda: expanded_sdpa(q, k, v),
        }
        if device == "cuda":  # on a CPU ours is the same
            calls["torch SDPA, one K and V"] = lambda: keyframe_attention(q, k, v, HEADS, backend="reference")
        if device == "cuda" and find_spec("xformers") and dtype != torch.float32:
            calls["xformers, K and V expanded"] = lambda: xformers_attention(q, k, v)
        return calls
    return {
        f"ours ({chosen(problem.op, q, k, v)})": lambda: temporal_attention(q, k, v, HEADS),
        "torch SDPA, positions first": lambda: transposed_sdpa(q, k, v),
    }


def chosen(op: str, *tensors: Tensor) -> str:
    """Return the backend that `None` takes for these tensors."""
    return next(name for name in BACKENDS[op] if unsupported_reason(op, name, *tensors, heads=HEADS) is None)


def cv2_loop(latent: np.ndarray, affines: np.ndarray, rects: np.ndarray) -> np.ndarray:
    """Do the method's step 4 as one would write it: cv2.warpAffine per frame, region and channel, then the paste."""
    out = np.repeat(latent[None], len(affines) + 1, 0)
    for frame, frame_affines, frame_rects in zip(out[1:], affines, rects, strict=True):
        for affine, (x0, y0, x1, y1) in zip(frame_affines, frame_rects, strict=True):
            for target, source in zip(frame, latent, strict=True):
                warped = cv2.warpAffine(source, affine, source.shape[::-1], flags=cv2.INTER_LINEAR)
                target[y0:y1, x0:x1] = warped[y0:y1, x0:x1]
    return out


def paste_problem(num_frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a face and two hands that move a little on a 4 × 64 × 64 latent: latent, affines, rects."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(4, 64, 64, generator=generator)
    noise = torch.randn(num_frames, 3, 2, 3, generator=generator)
    affines = torch.eye(2, 3) + noise * torch.tensor([0.05, 0.05, 2.0])
    rects = torch.tensor([[24, 6, 44, 30], [6, 36, 18, 48], [46, 36, 58, 48]]).expand(num_frames, 3, 4).contiguous()
    return latent, affines, rects


def bench_paste(device: str, budget_s: float, peaks: dict[str, float]) -> list[Row]:
    """Time affine_warp_paste at N = 100 against the cv2 loop, in this process and on the same data."""
    latent, affines, rects = paste_problem(100)
    arrays = latent.numpy(), affines.numpy(), rects.numpy()
    on_device = [tensor.to(device) for tensor in (latent, affines, rects)]
    op = "affine_warp_paste"
    backends = [name for name in BACKENDS[op] if unsupported_reason(op, name, on_device[0]) is None]
    calls: dict[str, Callable[[], Any]] = {
        f"ours ({name})": lambda name=name: affine_warp_paste(*on_device, backend=name) for name in backends
    }
    if device == "cpu":
        calls["cv2.warpAffine per frame, region, channel"] = lambda: cv2_loop(*arrays)
    timings = compare(calls, budget_s=budget_s)
    if device == "cuda":
        host = time_on_cpu(lambda: cv2_loop(*arrays), budget_s, 5)
        timings["cv2.warpAffine per frame, region, channel (host)"] = host
    pasted = int(((rects[..., 2] - rects[..., 0]) * (rects[..., 3] - rects[..., 1])).sum())
    num_bytes = paste_bytes(100, 4, 64 * 64, pasted, 4)
    what = {"op": "affine_warp_paste", "shape": "N=100 R=3 4x64x64", "dtype": "float32"}
    return rows(what, timings, num_bytes, 8 * 4 * pasted, peaks)


def rows(what: Row, timings: dict[str, Timing], num_bytes: int, flops: int, peaks: dict[str, float]) -> list[Row]:
    """Return one result per contender, with its share of the measured roofline."""
    ideal_ms = 1e3 * max(num_bytes / peaks["bytes_per_s"], flops / peaks[what["dtype"]])
    cost = {"bytes": num_bytes, "flops": flops, "roofline_ms": round(ideal_ms, 4)}
    shares = {name: round(100 * ideal_ms / timing.median_ms, 1) for name, timing in timings.items()}
    return [
        what | cost | {"contender": name, **timing.to_json(), "roofline_percent": shares[name]}
        for name, timing in timings.items()
    ]


def measure_peaks(device: str, dtypes: list[torch.dtype], budget_s: float) -> dict[str, float]:
    """Measure bytes per second of a large copy (reads and writes), and FLOP/s of a matrix product in each dtype."""
    size = 8192 if device == "cuda" else 1024
    source = torch.ones((1 << 30 if device == "cuda" else 1 << 26) // 4, device=device)
    target = torch.empty_like(source)
    timed = time_call if device == "cuda" else time_on_cpu  # even if there is a GPU
    copied = timed(lambda: target.copy_(source), budget_s=budget_s)
    peaks = {"bytes_per_s": 2e3 * source.nbytes / copied.min_ms}
    for dtype in dict.fromkeys([torch.float32, *dtypes]):
        a = torch.randn(size, size, device=device).to(dtype)
        multiplied = timed(lambda a=a: a @ a, budget_s=budget_s)
        # A processor without this type multiplies it more slowly than float32, but can convert it to float32.
        peak = max(2e3 * size**3 / multiplied.min_ms, peaks.get("float32", 0.0))
        peaks[str(dtype).removeprefix("torch.")] = peak
    return peaks


def measure_peak(precision: str, device: str) -> Row:
    """Measure the FLOP/s of a large matrix product at its fastest, on "cuda" or "cpu"; for int8 in float32.

    torch 2.13 multiplied 8-bit matrices no faster than float32 ones on a processor with AVX-512 VNNI.
    """
    dtype = TORCH_DTYPES.get(precision, torch.float32)
    peaks = measure_peaks(device, [dtype], budget_s=0.5)
    return {"flops_per_s": peaks[str(dtype).removeprefix("torch.")]}


def markdown(document: Row) -> str:
    """Format the results as a table."""
    facts = ", ".join(f"{key} {value}" for key, value in document["machine"].items())
    peaks = ", ".join(f"{key} {value:.3g}" for key, value in document["peaks"].items())
    lines = [f"# Operators on {document['device']}", "", f"Machine: {facts}", "", f"Measured peaks: {peaks} (FLOP/s)."]
    header = ("op", "shape", "dtype", "contender", "median ms", "p95 ms", "MB", "GFLOP", "% of roofline")
    lines += ["", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in document["rows"]:
        cells = [row["op"], row["shape"], row["dtype"], row["contender"]]
        cells += [f"{row['median_ms']:.3f}", f"{row['p95_ms']:.3f}"]
        cells += [f"{row['bytes'] / 1e6:.1f}", f"{row['flops'] / 1e9:.2f}", f"{row['roofline_percent']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wide = "float16" if device == "cuda" else "float32"
    parser = new_parser(__doc__, "a tenth of a second for each contender, one type")
    parser.add_argument("--dtypes", nargs="+", default=[wide, "bfloat16"])
    parser.add_argument("--frames", nargs="+", type=int, default=[9, 101] if device == "cuda" else [9])
    parser.add_argument("--scale", type=int, default=1 if device == "cuda" else 4, help="divide the positions by this")
    parser.add_argument("--budget-s", type=float, default=0.5, help="seconds for each contender")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads, of cv2 too")
    options = parser.parse_args()
    if options.quick:
        options.budget_s, options.dtypes = 0.1, options.dtypes[:1]
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)
    dtypes = [getattr(torch, name) for name in options.dtypes]
    peaks = measure_peaks(device, dtypes, options.budget_s)
    results = bench_paste(device, options.budget_s * 2, peaks)
    for frames in options.frames:
        for problem in attentions(frames, options.scale):
            for dtype in dtypes:
                timings = compare(attention_calls(problem, dtype, device), budget_s=options.budget_s)
                shape = f"F={frames} L={problem.tokens} C={problem.channels} keys={problem.num_keys}"
                what = {"op": problem.op, "shape": shape, "dtype": str(dtype).removeprefix("torch.")}
                results += rows(what, timings, problem.num_bytes(dtype.itemsize), problem.flops, peaks)
    name = machine().get("gpu", "cpu")
    document = {"device": name, "machine": machine(), "peaks": peaks, "rows": results}
    publish(name_by_device("kernels", document["machine"]), document, markdown(document), options.json, options.quick)


if __name__ == "__main__":
    main()
