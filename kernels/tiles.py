"""Device functions of both attention kernels: they load and store columns of a head.

Layer 2: device code only.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_columns(
    pointers, row_mask, FIRST: tl.constexpr, COUNT: tl.constexpr, HEAD_SIZE: tl.constexpr, MASKED: tl.constexpr
):
    """Load COUNT columns from column FIRST of a head; columns beyond the head, and masked rows, read as 0.

    pointers: (..., 1) to each row's first column; row_mask: (..., 1), read where MASKED.
    """
    columns = FIRST + tl.arange(0, COUNT)
    columns = columns[None, None, :] if len(pointers.shape) == 3 else columns[None, :]
    if FIRST + COUNT > HEAD_SIZE:
        if MASKED:
            tile = tl.load(pointers + columns, mask=row_mask & (columns < HEAD_SIZE), other=0.0)
        else:
            tile = tl.load(pointers + columns, mask=columns < HEAD_SIZE, other=0.0)
    elif MASKED:
        tile = tl.load(pointers + columns, mask=row_mask, other=0.0)
    else:
        tile = tl.load(pointers + columns)
    return tile


@triton.jit
def load_chunk(pointers, row_mask, first, COUNT: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """As `load_columns` with MASKED, from a column that is known only at run time; pointers, row_mask: (..., 1)."""
    columns = first + tl.arange(0, COUNT)
    columns = columns[None, None, :] if len(pointers.shape) == 3 else columns[None, :]
    mask = row_mask & (columns < HEAD_SIZE) if HEAD_SIZE % COUNT > 0 else row_mask
    return tl.load(pointers + columns, mask=mask, other=0.0)


@triton.jit
def store_columns(pointers, row_mask, tile, FIRST: tl.constexpr, COUNT: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """The counterpart of `load_columns`; writes nothing beyond the head or in masked rows."""
    columns = FIRST + tl.arange(0, COUNT)
    columns = columns[None, None, :] if len(pointers.shape) == 3 else columns[None, :]
    tl.store(pointers + columns, tile.to(pointers.dtype.element_ty), mask=row_mask & (columns < HEAD_SIZE))
