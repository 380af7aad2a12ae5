"""GPU kernels for what lies between the matrix products of a decoder layer: norms, positions, attention.
Knows: Triton, numbers. Must not know: which model it is, what a token tree is.

Only fused.py imports this file: it needs Triton. Attention keeps its running maximum and sum as in Dao et
al., FlashAttention (arXiv 2205.14135), section 3.1; its mask is any, as token trees have one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_and_norm(hidden, more, weight, out, size, epsilon, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """Add ``more`` to ``hidden`` in place and write its RMS norm: one program a token.

    hidden, out: [T, size]; ADD: in how many parts ``more`` comes, [ADD, T, size]; 0: there is none.
    """
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK)
    inside = column < size
    x = tl.load(hidden + at, mask=inside, other=0.0)
    if ADD:
        x = x + _sum_parts(more + at, inside, size, ADD, x.dtype)
        tl.store(hidden + at, x, mask=inside)
    wide = x.to(tl.float32)
    scaled = wide / tl.sqrt(tl.sum(wide * wide, 0) / size + epsilon)
    kind = out.dtype.element_ty
    scaled = scaled.to(kind) * tl.load(weight + column, mask=inside, other=0.0).to(kind)
    tl.store(out + at, scaled, mask=inside)


@triton.jit
def _sum_parts(at, inside, size, PARTS: tl.constexpr, kind: tl.constexpr):
    """Return the sum of parts, each of ``size`` entries a program, in order, rounded to ``kind``."""
    total = tl.load(at, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(at + tl.num_programs(0).to(tl.int64) * size * part, mask=inside, other=0.0)
    return total.to(kind)


@triton.jit
def _place(places, index, kind: tl.constexpr):
    """Return the buffer whose address is entry ``index``: kernels of a graph find buffers that have moved."""
    return tl.multiple_of(tl.load(places + index).to(tl.pointer_type(kind)), 16)


# Index arrays are slices of one array. Their alignment varies, and each would compile a kernel of its own.
@triton.jit(do_not_specialize=["layer"], do_not_specialize_on_alignment=["cells", "places"])
def rotate_and_store(mixed, cosines, sines, query_norm, key_norm, cells, places, queries, layer, epsilon,
                     PARTS: tl.constexpr, NORM: tl.constexpr, Q: tl.constexpr, H: tl.constexpr,
                     D: tl.constexpr, HEADS: tl.constexpr, DP: tl.constexpr):
    """Rotate queries and keys by position and write keys and values to the cache: one program a token.

    mixed: [PARTS, T, (Q + 2 H) D], to be added up, of Q query heads, H key heads and H value heads;
    cosines, sines: [T, D];
    query_norm, key_norm: [D], weights of an RMS norm of each head before that, where NORM;
    cells: [T], cache cell of each token's keys and values, -1 of padding; queries: [T, Q D] to write;
    places: [2 L], addresses of each layer's keys and values [*, H D] to write.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, DP)[None, :]
    row = mixed + token * (Q + 2 * H) * D
    inside = (head < Q + 2 * H) & (column < D)
    half: tl.constexpr = D // 2
    other = tl.where(column < half, column + half, column - half)
    kind = queries.dtype.element_ty
    size: tl.constexpr = (Q + 2 * H) * D
    given = _sum_parts(row + head * D + column, inside, size, PARTS, kind)
    x = given.to(tl.float32)
    partner = _sum_parts(row + head * D + other, inside & (head < Q + H), size, PARTS, kind).to(tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + epsilon)
        x = (x * scale[:, None]).to(kind).to(tl.float32)
        x *= _norm_weights(query_norm, key_norm, head, column, Q, D)
        partner = (partner * scale[:, None]).to(kind).to(tl.float32)
        partner *= _norm_weights(query_norm, key_norm, head, other, Q, D)
    cosine = tl.load(cosines + token * D + column, mask=column < D, other=0.0).to(tl.float32)
    sine = tl.load(sines + token * D + column, mask=column < D, other=0.0).to(tl.float32)
    turned = x * cosine + tl.where(column < half, -partner, partner) * sine
    turned = turned.to(kind)
    tl.store(queries + token * Q * D + head * D + column, turned, mask=inside & (head < Q))
    cell = tl.load(cells + token)
    inside = inside & (cell >= 0)
    keys = _place(places, 2 * layer, kind) + cell * H * D + column
    values = _place(places, 2 * layer + 1, kind) + cell * H * D + column
    tl.store(keys + (head - Q) * D, turned, mask=inside & (head >= Q) & (head < Q + H))
    tl.store(values + (head - Q - H) * D, given, mask=inside & (head >= Q + H))


@triton.jit
def _norm_weights(query_norm, key_norm, head, column, Q: tl.constexpr, D: tl.constexpr):
    of_query = tl.load(query_norm + column, mask=column < D, other=0.0).to(tl.float32)
    of_key = tl.load(key_norm + column, mask=column < D, other=0.0).to(tl.float32)
    return tl.where(head < Q, of_query, of_key)


@triton.jit(do_not_specialize=["words", "layer"],  # they change from event to event, from layer to layer
            do_not_specialize_on_alignment=["places", "rows", "seen"])
def attend(queries, places, rows, seen, out, scale, words, layer, H: tl.constexpr, G: tl.constexpr,
           D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Attend from the tokens of an utterance to its slots: a program an utterance, key head and M queries.

    queries, out: [T, H, G, D], G query heads for each of H key heads; an utterance's tokens lie side by side;
    places: [2 L], addresses of each layer's keys and values [*, H, D];
    rows: [B, 4], of each utterance its first token, the one after its last, its slots, its first cache cell;
    seen: [T, words], a bit for each slot that a token sees; that of slot s is bit (s % 32) ^ 7 of its word.
    """
    utterance = tl.program_id(0)
    head = tl.program_id(1)
    line = tl.program_id(2) * M + tl.arange(0, M)
    begin_token = tl.load(rows + utterance * 4)
    end_token = tl.load(rows + utterance * 4 + 1)
    slots = tl.load(rows + utterance * 4 + 2).to(tl.int32)
    cell = tl.load(rows + utterance * 4 + 3)
    token, group = begin_token + line // G, line % G
    real = token < end_token
    slots = tl.where(begin_token + tl.program_id(2) * M // G < end_token, slots, 0)  # else nothing to do
    column = tl.arange(0, DP)
    query_at = ((token * H + head) * G + group)[:, None] * D + column[None, :]
    some = real[:, None] & (column < D)[None, :]
    query = tl.load(queries + query_at, mask=some, other=0.0)
    keys = _place(places, 2 * layer, query.dtype)
    values = _place(places, 2 * layer + 1, query.dtype)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    sums = tl.zeros((M, DP), tl.float32)
    for begin in range(0, slots, N):
        slot = begin + tl.arange(0, N)
        here = slot < slots
        at = ((cell + slot) * H + head) * D
        key = tl.load(keys + at[None, :] + column[:, None], mask=here[None, :] & (column < D)[:, None],
                      other=0.0)
        word = tl.load(seen + token[:, None] * words + (slot >> 5)[None, :],
                       mask=real[:, None] & here[None, :], other=0)
        score = tl.dot(query, key, input_precision="ieee") * scale
        score = tl.where(((word >> ((slot & 31) ^ 7)[None, :]) & 1) != 0, score, float("-inf"))
        high = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(high == float("-inf"), 0.0, high)
        share = tl.exp(score - shift[:, None])
        kept = tl.exp(top - shift)
        value = tl.load(values + at[:, None] + column[None, :], mask=here[:, None] & (column < D)[None, :],
                        other=0.0)
        sums = sums * kept[:, None] + tl.dot(share.to(value.dtype), value, input_precision="ieee")
        total = total * kept + tl.sum(share, 1)
        top = high
    sums = sums / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out + query_at, sums.to(out.dtype.element_ty), mask=some)


@triton.jit
def silu_and_multiply(mixed, out, size, BLOCK: tl.constexpr):
    """Write ``silu(gate) * up`` of mixed [T, 2 * size]: gates, then the others."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(mixed + token * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(mixed + (token * 2 + 1) * size + column, mask=inside, other=0.0)
    opened = (gate / (1.0 + tl.exp(-gate))).to(up.dtype)
    tl.store(out + token * size + column, opened * up, mask=inside)
