"""Chooses the tile of each row of the launch table from the times of kernel_tune.py, and formats those for people.

Bench: imported by kernel_tune.py; needs no GPU.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from bench.kernel_fits import OtherTriton, Use, fits
from bench.kernel_search import Table
from bench.kernel_trials import Tile
from bench.report import table
from bench.workloads import Attention
from posecrafter_rt.kernels.configs import TABLE, TemporalConfig, TileConfig

GAIN = 1.03  # a smaller gain is not worth a change of the table

Record = dict[str, Any]


def make_tile(op: str, values: dict[str, Any]) -> Tile:
    return (TileConfig if op == "keyframe_attention" else TemporalConfig)(**values)


def final(record: Record) -> list[Record]:
    """Return the candidates that were timed a second time, the fastest first."""
    return sorted((one for one in record["candidates"] if "ms" in one), key=lambda one: sum(one["ms"]))


def faster(record: Record) -> list[tuple[Tile, float]]:
    """Return the tiles that are worth a change of the table, with their speed-up over its tile, the fastest first."""
    timed = final(record)
    current = next((one for one in timed if one["tile"] == record["current"]), None)
    if current is None:
        return []
    gains = [(make_tile(record["op"], one["tile"]), sum(current["ms"]) / sum(one["ms"])) for one in timed]
    return [(tile, gain) for tile, gain in gains if gain > GAIN]


def settle(document: Record, others: list[OtherTriton]) -> Table:
    """Return the table; each measured row has its fastest tile that gains enough and spills under no Triton."""
    entries = json.loads(TABLE.read_text())
    for record in document["rows"]:
        key = record["key"]
        use = Use(record["op"], (key["capability"],), key["element_bytes"], key["max_head_size"])
        for tile, gain in faster(record):
            if fits(use, tile) and all(other.fits(use, tile) for other in others):
                entry = next(entry for entry in entries[use.op] if key.items() <= entry.items())
                entry.update(asdict(tile))
                print(f"{record['name']}: {words(asdict(tile))}, {gain:.2f} times as fast", flush=True)
                break
            print(f"{record['name']}: {words(asdict(tile))} spills or is refused", flush=True)
    return entries


def words(tile: dict[str, Any]) -> str:
    """Describe a tile: `64×128 w4 s2`, or a temporal one: `4×(16×16) w2 s1`."""
    if "block_m" in tile:
        blocks = f"{tile['block_m']}×{tile['block_n']}"
    else:
        blocks = f"{tile['block_p']}×({tile['block_q']}×{tile['block_k']})"
    return f"{blocks} w{tile['num_warps']} s{tile['num_stages']}" + (f" c{tile['chunk']}" if tile.get("chunk") else "")


def markdown(document: Record) -> str:
    """Format the results as a table: a line per problem, and one for the sum of a row's problems."""
    peaks = document["peaks"]
    lines = [f"# Tiles of the attention kernels on {document['machine'].get('gpu', 'cpu')}", "",
             "Milliseconds, medians, L2 flushed. Roofline: the bytes at a copy's speed, or the FLOPs at a matrix product's, "
             f"whichever takes longer ({peaks['bytes_per_s'] / 1e9:.0f} GB/s, {peaks['float16'] / 1e12:.0f} TFLOP/s in 16 "
             f"bits, {peaks['float32'] / 1e12:.0f} in fp32, measured).", ""]  # fmt: skip
    header = ("row", "problem", "table's tile", "ms", "best tile", "ms", "gain", "SDPA ms", "% of roofline")
    lines += table(header, [cells for record in document["rows"] for cells in record_cells(record, peaks)])
    dropped = [(record["name"], words(one["tile"]), one["dropped"])
               for record in document["rows"] for one in record["candidates"] if one["dropped"]]  # fmt: skip
    if dropped:
        lines += ["Not timed:", "", *table(("row", "tile", "why"), dropped)]
    if document["not_measured"]:
        lines += ["No time was left for " + ", ".join(document["not_measured"]) + ".", ""]
    if document["error"]:
        lines += [f"Stopped by an error: {document['error']}", ""]
    return "\n".join(lines)


def record_cells(record: Record, peaks: dict[str, float]) -> list[tuple[str, ...]]:
    """Return a row's lines of the table."""
    timed = final(record)
    current = next((one for one in timed if one["tile"] == record["current"]), None)
    if current is None:
        return [(record["name"], "nothing timed", words(record["current"]), *[""] * 6)]
    best, element_bytes = timed[0], record["key"]["element_bytes"]
    peak = peaks["float16" if element_bytes == 2 else "float32"]
    shapes, sdpa, ideal = [], [], []
    for case in record["cases"]:
        problem = Attention(**{name: value for name, value in case.items() if name != "sdpa_ms"})
        shapes.append(f"F={problem.frames} L={problem.tokens} C={problem.channels} keys={problem.num_keys}")
        sdpa.append(case["sdpa_ms"])
        ideal.append(1e3 * max(problem.num_bytes(element_bytes) / peaks["bytes_per_s"], problem.flops / peak))
    columns = [current["ms"], best["ms"], sdpa, ideal]
    if len(shapes) > 1:
        shapes, columns = [*shapes, "all"], [[*column, sum(column)] for column in columns]
    return [(record["name"], shape, words(record["current"]), f"{ours:.4f}", words(best["tile"]), f"{fastest:.4f}",
             f"{ours / fastest:.3f}", f"{torch_ms:.4f}", f"{100 * roofline / fastest:.0f}")
            for shape, ours, fastest, torch_ms, roofline in zip(shapes, *columns, strict=True)]  # fmt: skip
