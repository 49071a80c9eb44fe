"""Chooses kernels/configs.json without a GPU: compiles every candidate tile, models its time, keeps the best.

Bench: `python -m bench.kernel_search [PYTHON...]` rewrites the table; it takes a quarter of an hour and needs Triton.
Whether a tile spills depends on Triton's version. Each PYTHON is the interpreter of an environment with another
version, and a tile must fit under all of them. The model only ranks tiles; it does not predict times. On a GPU,
bench/kernels.py measures them.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from bench.hardware import GPUS, Gpu, blocks_per_multiprocessor
from bench.kernel_fits import DTYPES, REPRESENTATIVES, OtherTriton, Use, fits
from posecrafter_rt.kernels.compile import Compiled, compile_keyframe, compile_temporal
from posecrafter_rt.kernels.configs import TABLE, TemporalConfig, TileConfig, split_head

HEAD_CLASSES = {2: (48, 80, 160, 256), 4: (48, 80, 160)}  # by element size; a head takes the first class that holds it
CHUNKED = {2: (), 4: (80, 160)}  # temporal classes by element size that spill unless scores are summed in chunks
CHUNK = 16
FRAME_CLASSES = {16: 9, 32: 32, 256: 101}  # the longest clip of a class: a typical one
EXP_PER_CYCLE = 16  # by a multiprocessor's special function units
ALU_PER_CYCLE = 128
ALU_PER_SCORE = 6  # scale, maximum, shift, sum, conversion, rescaling
SHARED_BYTES_PER_CYCLE = 128
MEMORY_LATENCY_S = 700e-9
EXPOSED_CYCLES = {1: 600, 2: 100, 3: 0}  # waiting for a tile's loads, by pipeline stages; other resident blocks fill it
BLOCK_CYCLES = 150  # a multiprocessor's cost of starting a block

Trial = tuple[float, Any, Compiled]  # modelled cost, tile, machine code
Table = dict[str, list[dict[str, Any]]]  # operator → rows


def padded(head_size: int) -> int:
    return sum(split_head(head_size))


def overlap(blocks: int, num_warps: int) -> float:
    """Return how much of the other resources the busiest one hides; we assume all at three warps per scheduler."""
    return min(1.0, blocks * num_warps / 12)


def keyframe_cost(gpu: Gpu, config: TileConfig, built: Compiled, head_size: int, element_bytes: int) -> float:
    """Return the modelled cycles of one multiprocessor per score, lower is better; infinite if a limit is broken."""
    blocks = blocks_per_multiprocessor(gpu, built.num_warps, built.registers, built.shared_bytes)
    if blocks == 0 or built.spill_bytes:
        return float("inf")
    tensor = 4 * padded(head_size) * gpu.multiprocessors * gpu.clock_hz / gpu.flops(element_bytes)
    scalar = 1 / EXP_PER_CYCLE + ALU_PER_SCORE / ALU_PER_CYCLE
    readers = 1 if gpu.capability >= 90 else config.num_warps  # a warp group reads shared operands together
    shared = 2 * padded(head_size) * element_bytes * readers / (config.block_m * SHARED_BYTES_PER_CYCLE)
    parts = sorted((tensor, scalar, shared))
    hidden = overlap(blocks, built.num_warps)
    fill = config.block_n / (config.block_n + 8)  # a tile's fixed cost: barriers, row maxima, rescaling
    exposed = EXPOSED_CYCLES[config.num_stages] / (blocks * config.block_m * config.block_n)
    return (parts[2] + (1 - hidden) * (parts[0] + parts[1])) / fill + exposed


def temporal_cost(
    gpu: Gpu, config: TemporalConfig, built: Compiled, head_size: int, frames: int, element_bytes: int
) -> float:
    """Return the modelled seconds × 10⁹ of the card for one position and head; infinite if a limit is broken."""
    blocks = blocks_per_multiprocessor(gpu, built.num_warps, built.registers, built.shared_bytes)
    if blocks == 0 or built.spill_bytes:
        return float("inf")
    queries = -(-frames // config.block_q) * config.block_q
    keys = -(-frames // config.block_k) * config.block_k
    tensor = 4 * queries * keys * padded(head_size) / gpu.flops(element_bytes)
    useful = 4 * frames * head_size * element_bytes
    in_flight = blocks * gpu.multiprocessors * config.block_p * min(frames, config.block_q) * head_size * element_bytes
    memory = useful / min(gpu.memory_bytes_per_s, 3 * in_flight / MEMORY_LATENCY_S)
    reread = 2 * (1 + queries / config.block_q) * frames * head_size * element_bytes  # a query block reads all keys
    memory = max(memory, reread / gpu.l2_bytes_per_s)
    score_cycles = queries * keys * (1 / EXP_PER_CYCLE + ALU_PER_SCORE / ALU_PER_CYCLE)
    scalar = score_cycles / (gpu.multiprocessors * gpu.clock_hz)
    starts = queries / config.block_q / config.block_p * BLOCK_CYCLES / (gpu.multiprocessors * gpu.clock_hz)
    parts = sorted((tensor, memory, scalar))
    hidden = overlap(blocks, built.num_warps)
    return (parts[2] + (1 - hidden) * (parts[0] + parts[1]) + starts) * 1e9


def keyframe_candidates(head_class: int, element_bytes: int) -> Iterator[TileConfig]:
    is_large = element_bytes == 4 or head_class > 160  # few of these fit at all, so small tiles are tried, too
    block_ms, block_ns = ((32, 64), (16, 32)) if is_large else ((64, 128), (32, 64, 128))
    for block_m, block_n, stages in itertools.product(block_ms, block_ns, (1, 2) if is_large else (2, 3)):
        for warps in (2, 4, 8):
            accumulators = block_m * padded(head_class) / (warps * 32)
            # Fewer rows per warp would split the head between warps, and the model does not count their exchanges.
            tile_bytes = stages * 2 * block_n * padded(head_class) * element_bytes
            if block_m / warps in (16, 32) and accumulators <= 128 and tile_bytes <= 128 << 10:
                yield TileConfig(block_m, block_n, warps, stages)


def temporal_candidates(frames: int, head_class: int, element_bytes: int) -> Iterator[TemporalConfig]:
    if head_class in CHUNKED[element_bytes]:
        yield from chunked_candidates(frames, head_class)
        return
    tiles = {16: (16,), 32: (16, 32), 256: (16, 32, 64)}[frames]
    keys = {16: (16,), 32: (16, 32), 256: (16, 32, 64)}[frames]
    for block_q, block_k, num_rows, warps in itertools.product(tiles, keys, (16, 32, 64, 128), (1, 2, 4, 8)):
        accumulators = num_rows * padded(head_class) / (warps * 32)
        is_tried = num_rows in (32, 64) or frames == 16
        if is_tried and num_rows >= block_q and num_rows / warps in (8, 16, 32) and accumulators <= 128:
            yield TemporalConfig(num_rows // block_q, block_q, block_k, warps, 1 if frames <= 32 else 2)


def chunked_candidates(frames: int, head_class: int) -> Iterator[TemporalConfig]:
    """Yield tiles for heads in chunks. Few fit, none with more queries, so one row of the table serves all clips."""
    for num_rows, warps in itertools.product((16, 32, 64), (1, 2, 4, 8)):
        accumulators = num_rows * padded(head_class) / (warps * 32)
        if frames == 256 and num_rows / warps in (8, 16, 32) and accumulators <= 128:
            yield TemporalConfig(num_rows // 16, 16, 16, warps, 1, chunk=CHUNK)


def attempt(build: Any, *arguments: Any) -> Compiled | None:
    """Compile; return None if Triton refuses the tile (shared memory, an unsupported layout)."""
    try:
        return build(*arguments)
    except Exception as error:  # the compiler raises many kinds; a refused tile is no candidate
        print(f"    refused: {arguments}: {type(error).__name__}", file=sys.stderr)
        return None


def best(rows: list[Trial], what: object, use: Use, others: list[OtherTriton]) -> Any | None:
    """Return the cheapest configuration that fits everywhere, or None; then the operator refuses such heads."""
    for cost, config, built in sorted(rows, key=lambda row: row[0]):
        if cost < float("inf") and fits(use, config) and all(other.fits(use, config) for other in others):
            print(what, config, built.registers, built.shared_bytes, f"{cost:.4f}", flush=True)
            return config
    print(what, "no candidate fits without spills", flush=True)
    return None


def try_tile(gpu: Gpu, use: Use, frames: int, tile: TileConfig | TemporalConfig) -> Trial | None:
    """Return a tile with its modelled cost and machine code, or None if it is refused. frames: of a clip (temporal)."""
    head_size, dtype = REPRESENTATIVES[use.head_class], DTYPES[use.element_bytes][0]
    build = compile_keyframe if isinstance(tile, TileConfig) else compile_temporal
    built = attempt(build, gpu.capability, dtype, head_size, tile)
    if built is None:
        return None
    if isinstance(tile, TileConfig):
        return keyframe_cost(gpu, tile, built, head_size, use.element_bytes), tile, built
    return temporal_cost(gpu, tile, built, head_size, frames, use.element_bytes), tile, built


def search_keyframe(gpu: Gpu, element_bytes: int, head_class: int, others: list[OtherTriton]) -> Iterator[Any]:
    """Yield the table's row for one GPU, element size and head class, if a tile fits."""
    key = {"capability": gpu.capability, "element_bytes": element_bytes, "max_head_size": head_class}
    use = Use("keyframe_attention", (gpu.capability,), element_bytes, head_class)
    trials = [try_tile(gpu, use, 0, tile) for tile in keyframe_candidates(head_class, element_bytes)]
    if (config := best([trial for trial in trials if trial], key, use, others)) is not None:
        yield key | asdict(config)


def search_temporal(gpu: Gpu, element_bytes: int, head_class: int, others: list[OtherTriton]) -> Iterator[Any]:
    """Yield the table's rows for one GPU, element size and head class: one per class of frames."""
    key = {"capability": gpu.capability, "element_bytes": element_bytes, "max_head_size": head_class}
    use = Use("temporal_attention", (86, 90), element_bytes, head_class)  # one row serves both architectures
    for frames, typical in FRAME_CLASSES.items():
        trials = [try_tile(gpu, use, typical, tile) for tile in temporal_candidates(frames, head_class, element_bytes)]
        if (
            config := best([trial for trial in trials if trial], key | {"max_frames": frames}, use, others)
        ) is not None:
            yield key | {"max_frames": frames} | asdict(config)


def search(others: list[OtherTriton]) -> Table:
    """Return the whole table."""
    table: Table = {"keyframe_attention": [], "temporal_attention": []}
    small, large = (next(gpu for gpu in GPUS if gpu.capability == capability) for capability in (86, 90))
    for element_bytes, classes in HEAD_CLASSES.items():
        for head_class in classes:
            # sm_89 uses the rows of sm_86: it has the same instructions and limits.
            for gpu in (small, large):
                table["keyframe_attention"] += search_keyframe(gpu, element_bytes, head_class, others)
            for row in search_temporal(small, element_bytes, head_class, others):
                table["temporal_attention"] += [row, row | {"capability": large.capability}]
    return table


def write_table(table: Table) -> None:
    """Replace kernels/configs.json; each row is one line."""
    lines = {op: ",\n  ".join(json.dumps(row) for row in rows) for op, rows in table.items()}
    TABLE.write_text("{\n" + ",\n".join(f' "{op}": [\n  {rows}\n ]' for op, rows in lines.items()) + "\n}\n")


def main() -> None:
    others = [OtherTriton(python) for python in sys.argv[1:]]
    table = search(others)
    for other in others:
        other.close()
    write_table(table)


if __name__ == "__main__":
    main()
