"""Matrix products of few rows with a decoder layer's weights: any tile, split sums, gates in the same kernel.
Knows: Triton, numbers. Must not know: which model it is, which form is the fastest.

Only products.py imports this file: it needs Triton. The copy engine fetches blocks (tensor descriptors). A
sum that is split over programs is left in parts, which the next kernel adds in order: the same numbers in
every run. Never run on a GPU yet; compiled for sm_90, and run in Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def multiply(rows, more_rows, weights, out, more_out, count, width, size, GATED: tl.constexpr,
             M: tl.constexpr, MORE: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Write ``rows @ weights.T``: a program a tile of M + MORE rows and N columns, and a part of the sums.

    rows, more_rows: descriptors of the same [count, size], blocks [M, K] and [MORE, K], where MORE is not 0;
    weights: descriptor of [width, size], blocks [N, K];
    out, more_out: descriptors of the same [parts, count, width], blocks [1, M, N] and [1, MORE, N]; of more
    than one part float32, to be added up.
    GATED: weights are [2 width, size], gates and then the others; out gets ``silu(gate) * other``.
    Tiles of the same columns follow each other, so that their weights come from memory once.
    """
    tiles = tl.cdiv(count, M + MORE)
    row = (tl.program_id(0) % tiles) * (M + MORE)
    column = (tl.program_id(0) // tiles) * N
    part = tl.program_id(1)
    steps = tl.cdiv(size, K)
    each = tl.cdiv(steps, tl.num_programs(1))
    sums = tl.zeros((M, N), tl.float32)
    more = tl.zeros((MORE if MORE else M, N), tl.float32)  # of more rows, or the others of gates
    for step in range(part * each, tl.minimum(part * each + each, steps)):
        left = rows.load([row, step * K])
        right = weights.load([column, step * K]).T
        sums = tl.dot(left, right, sums, input_precision="ieee")
        if MORE:
            more = tl.dot(more_rows.load([row + M, step * K]), right, more, input_precision="ieee")
        if GATED:
            other = weights.load([column + width, step * K]).T
            more = tl.dot(left, other, more, input_precision="ieee")
    kind = out.dtype
    result = sums.to(kind)
    if GATED:
        gate = result.to(tl.float32)  # rounded as where the product is a kernel of its own
        result = (gate / (1.0 + tl.exp(-gate))).to(kind) * more.to(kind)
    out.store([part, row, column], result.reshape(1, M, N))
    if MORE:
        more_out.store([part, row + M, column], more.to(kind).reshape(1, MORE, N))
