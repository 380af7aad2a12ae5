"""The prefix search as one GPU kernel: each program searches one utterance, many frames in one launch.
Knows: Triton, numbers. Must not know: beams, fusions, where the numbers come from.

The twin of frame_step.py and candidates.py, in natural-log masses as there. The state of an utterance stays
in registers from frame to frame; nothing waits for the host, and no program for another. K slots are padded
to a power of two (KP), so are the columns (CP) and the candidates (NP). Only gpu.py imports this
file: it needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from icefall_fusion.search.beam import DEAD_HASH, HASH_FACTOR, NO_PARENT_HASH, ROUNDING

NEVER = tl.constexpr(float("-inf"))
DEAD, ORPHAN = tl.constexpr(DEAD_HASH), tl.constexpr(NO_PARENT_HASH)
SLACK = tl.constexpr(ROUNDING)
FACTOR = tl.constexpr(HASH_FACTOR)
RESCALE = tl.constexpr(64)  # frames
LAST_PLACE = tl.constexpr(0x7FFFFFFF)
MOST_COLUMNS = tl.constexpr(1024)  # of a search with an n-gram

# rows of an utterance's state
NODE, BOUNDARY, LAST, HASH, PARENT_HASH, REPEATS, LENGTH, CONTEXT, INTEGERS = range(9)
TOTAL, BLANK, OPEN, FUSED, AHEAD, CLOSED, SCORED, GIVEN, NUMBERS = range(9)
AT, FIRED, LONGEST, DONE, COUNTS = range(5)


@triton.jit
def _log_add(one, other):
    high = tl.maximum(one, other)
    low = tl.minimum(one, other)
    below = tl.where(low == NEVER, NEVER, low - tl.where(low == NEVER, 0.0, high))
    return high + tl.log(1.0 + tl.exp(below))


@triton.jit
def _keys(score, place):
    """Return int64 numbers that sort as the scores do, and at equal scores the first of the places first."""
    bits = score.to(tl.int32, bitcast=True)
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (rising.to(tl.int64) << 32) | (place ^ LAST_PLACE).to(tl.int64)  # the more the earlier


@triton.jit
def _of_keys(keys):
    """Return the places and the scores of keys."""
    rising = (keys >> 32).to(tl.int32)
    bits = rising ^ ((rising >> 31) & 0x7FFFFFFF)
    return (keys & LAST_PLACE).to(tl.int32) ^ LAST_PLACE, bits.to(tl.float32, bitcast=True)


@triton.jit
def _lookup(table_keys, table_scores, table_backoffs, key, wanted, mask, probes):
    """Return (whether it is there, log-prob, back-off weight) of n-grams by key; see NgramTable."""
    place = key * FACTOR
    place = (place ^ (place >> 29)) & mask
    found = key < 0
    score = tl.zeros(key.shape, tl.float32)
    backoff = tl.zeros(key.shape, tl.float32)
    for _ in range(probes):
        there = tl.load(table_keys + place, mask=wanted & ~found, other=-1) == key
        score = tl.where(there, tl.load(table_scores + place, mask=there, other=0.0), score)
        backoff = tl.where(there, tl.load(table_backoffs + place, mask=there, other=0.0), backoff)
        found = found | there
        place = (place + 1) & mask
    return found, score, backoff


@triton.jit
def _estimate(
    context, piece, wanted, table_keys, table_scores, table_backoffs, mask, probes,
    ORDER: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    """Return natural-log P(piece | context), as PieceNgram.score does; a context's digits are ids + 1."""
    _, scores, _ = _lookup(table_keys, table_scores, table_backoffs, piece * 16 + 1, wanted, mask, probes)
    history = piece * 0
    known = wanted
    for length in tl.static_range(1, ORDER):
        before = context % (BASE + 1) - 1
        context = context // (BASE + 1)
        known = known & (before >= 0)
        history = history + tl.maximum(before, 0) * BASE ** (length - 1)
        found, _, backoff = _lookup(
            table_keys, table_scores, table_backoffs, history * 16 + length, known, mask, probes
        )
        longer, score, _ = _lookup(
            table_keys, table_scores, table_backoffs, (history * BASE + piece) * 16 + length + 1,
            known, mask, probes,
        )  # fmt: skip
        scores = tl.where(longer, score, scores + tl.where(found, backoff, 0.0))
    return scores


@triton.jit
def _best_with_ngram(
    stay_total, total, ended, fused, last, parent, context, columns, column_scores, place, starts,
    table_keys, table_scores, table_backoffs, mask, probes, weight, bonus,
    K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, ROOT: tl.constexpr,
    BOUNDARIES: tl.constexpr, ORDER: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    """Return places and scores of the best KP stays and extensions, those of an n-gram included, best first.

    Places: slot k stays at k, by column c it extends at KP + k * MOST_COLUMNS + c. Columns are looked at CP
    at a time, the most probable pieces first, as long as one could enter the beam if the n-gram were certain
    of it.
    """
    slot = tl.arange(0, KP)
    entry = tl.arange(0, KP * CP)
    from_slot = entry // CP
    old_last = tl.gather(last, from_slot, 0)
    whole = tl.gather(total, from_slot, 0)
    blank = tl.gather(ended, from_slot, 0)
    more = tl.gather(fused, from_slot, 0)
    history = tl.gather(context, from_slot, 0)
    links = tl.where(parent >= 0, parent.to(tl.int64) * BASE + last, -1)  # live extensions of live slots
    kept = tl.sort(_keys(tl.where(stay_total == NEVER, NEVER, stay_total + fused), slot), descending=True)
    most = tl.max(tl.where(total == NEVER, NEVER, total + fused), 0) + tl.maximum(bonus, 0.0) + SLACK
    first = place * 0
    score = tl.load(column_scores + place * C)
    floor = tl.max(tl.where(slot == K - 1, _of_keys(kept)[1], NEVER), 0)
    while (first < C) & (score > NEVER) & (most + score >= floor):
        column = first + entry % CP
        there = column < C
        piece = tl.load(columns + place * C + column, mask=there, other=ROOT).to(tl.int64)
        mass = tl.where(piece == old_last, blank, whole)
        mass += tl.load(column_scores + place * C + column, mask=there, other=NEVER)
        link = from_slot.to(tl.int64) * BASE + piece
        struck = tl.sum((link[:, None] == links[None, :]).to(tl.int32), 1) > 0
        hopeful = there & ~struck & (mass > NEVER)
        gain = weight * _estimate(
            history, piece, hopeful, table_keys, table_scores, table_backoffs, mask, probes, ORDER, BASE
        )
        if BOUNDARIES:
            begins = (tl.load(starts + piece) != 0) | (old_last == ROOT)
            gain += bonus * begins.to(tl.float32)
        mass = tl.where(hopeful, mass + more + gain, NEVER)
        found = tl.topk(_keys(mass, (KP + from_slot * MOST_COLUMNS + column).to(tl.int32)), KP)
        kept = tl.topk(tl.cat(kept, found, can_reorder=True), KP)
        floor = tl.max(tl.where(slot == K - 1, _of_keys(kept)[1], NEVER), 0)
        first += CP
        score = tl.load(column_scores + place * C + first, mask=first < C, other=NEVER)
    return _of_keys(kept)


# numbers that change from launch to launch, or are 1 now and then, make no new kernel
@triton.jit(do_not_specialize=["until", "batch", "pace_every", "score_beam", "table_mask", "table_probes",
                               "weight", "bonus", "row_stride", "frame_stride"],
            do_not_specialize_on_alignment=["log_probs", "lens"])  # fmt: skip
def search_utterances(
    log_probs, row_stride, frame_stride,  # float [B, T, V]
    blank_scores, shifts, columns, column_scores,  # [T, B], [T, B], int32 [T, B, C], [T, B, C]: see Frames
    lens, until,
    keys, starts,  # int64 [V], uint8 [V]
    candidate_slots, candidate_columns,  # int32 [NP]: what each extends; column -1: a stay, -2: none
    integers, numbers, counts, offsets,  # state: int64 [B, 8, KP], float [B, 8, KP], int64 [B, 4], double [B]
    parents, pieces, boundaries,  # int64 [rows, B, K]
    sources, grown, opened_words, gains,  # out, [B, K]: int64, bool, int64, float
    batch,
    pace_every, score_beam,
    table_keys, table_scores, table_backoffs, table_mask, table_probes,
    weight, bonus,  # of the n-gram
    K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, NP: tl.constexpr,
    WIDE: tl.constexpr, ROOT: tl.constexpr, RANKS: tl.constexpr, PACED: tl.constexpr, UNIT: tl.constexpr,
    BOUNDARIES: tl.constexpr, SCORE_BEAM: tl.constexpr, ORDER: tl.constexpr, BASE: tl.constexpr,
    SHALLOW: tl.constexpr, AHEAD_EVERY: tl.constexpr, I: tl.constexpr, F: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Let each utterance go on, before frame ``until`` or its end, if PACED no further than to its stop.

    ROOT: id of blank; UNIT: see StopRule, by number; BOUNDARIES: whether words are closed;
    SCORE_BEAM: whether there is one; ORDER: of the n-gram, 0: none;
    SHALLOW: whether it ranks extensions (2) or is recorded (1);
    AHEAD_EVERY: frames between two updates of its look-ahead, 0: it does none; I, F, W: rows of integers,
    numbers, counts.
    """
    b = tl.program_id(0)
    slot = tl.arange(0, KP)
    real = slot < K
    column = tl.arange(0, CP)
    candidate = tl.arange(0, NP)
    from_slot = tl.load(candidate_slots + candidate)
    from_column = tl.load(candidate_columns + candidate)
    stays = from_column == -1
    extends = from_column >= 0

    state = integers + b * I * KP + slot
    node = tl.load(state)
    boundary = tl.load(state + KP)
    last = tl.load(state + 2 * KP)
    content = tl.load(state + 3 * KP)
    parent_content = tl.load(state + 4 * KP)
    repeats = tl.load(state + 5 * KP)
    length = tl.load(state + 6 * KP)
    context = tl.load(state + 7 * KP)
    mass = numbers + b * F * KP + slot
    total = tl.load(mass)
    ended = tl.load(mass + KP)
    opened = tl.load(mass + 2 * KP)
    fused = tl.load(mass + 3 * KP)
    ahead = tl.load(mass + 4 * KP)
    closed = tl.load(mass + 5 * KP)
    scored = tl.load(mass + 6 * KP)
    given = tl.load(mass + 7 * KP)
    at = tl.load(counts + b * W)
    fired = tl.load(counts + b * W + 1) != 0
    longest = tl.load(counts + b * W + 2)
    done = tl.load(counts + b * W + 3)
    offset = tl.load(offsets + b)
    end = tl.minimum(tl.load(lens + b), until)

    origin = slot
    grew_ever = slot < 0
    gained = tl.zeros((KP,), tl.float32)
    words = tl.zeros((KP,), tl.int64)
    if AHEAD_EVERY > 0:
        scored = tl.where(fired, closed, scored)
        now = ahead - scored
        fused = tl.where(fired, fused + (now - given), fused)
        given = tl.where(fired, now, given)
    fired = at < 0
    disordered = at >= 0

    while (at < end) & ~fired:
        if RANKS:
            if disordered:  # scores came: the best to the front, as the choice of candidates needs it
                score = tl.where(total == NEVER, NEVER, total + fused)
                order, _ = _of_keys(tl.sort(_keys(score, slot), descending=True))
                node = tl.gather(node, order, 0)
                boundary = tl.gather(boundary, order, 0)
                last = tl.gather(last, order, 0)
                content = tl.gather(content, order, 0)
                parent_content = tl.gather(parent_content, order, 0)
                repeats = tl.gather(repeats, order, 0)
                length = tl.gather(length, order, 0)
                total = tl.gather(total, order, 0)
                ended = tl.gather(ended, order, 0)
                opened = tl.gather(opened, order, 0)
                fused = tl.gather(fused, order, 0)
                origin = tl.gather(origin, order, 0)
                grew_ever = tl.gather(grew_ever.to(tl.int32), order, 0) != 0
                if ORDER > 0:
                    context = tl.gather(context, order, 0)
                if SHALLOW > 0:
                    gained = tl.gather(gained, order, 0)
                    words = tl.gather(words, order, 0)
                if AHEAD_EVERY > 0:
                    ahead = tl.gather(ahead, order, 0)
                    closed = tl.gather(closed, order, 0)
                    scored = tl.gather(scored, order, 0)
                    given = tl.gather(given, order, 0)
            disordered = (AHEAD_EVERY > 0) & (at >= 0)
        place = at * batch + b
        shift = tl.load(shifts + place)
        blank_score = tl.load(blank_scores + place)
        piece_of = tl.load(columns + place * C + column, mask=column < C, other=-1).to(tl.int64)
        row = log_probs + b.to(tl.int64) * row_stride + at * frame_stride
        last_score = tl.load(row + last) + shift

        # stays, with what their parents' extensions bring
        linked = (parent_content[:, None] == content[None, :]).to(tl.int32)
        parent = tl.sum(linked * (slot + 1)[None, :], 1) - 1  # -1: none in the beam
        has_parent = parent >= 0
        at_parent = tl.maximum(parent, 0)
        brought = tl.where(repeats != 0, tl.gather(ended, at_parent, 0), tl.gather(total, at_parent, 0))
        stay_open = _log_add(opened, tl.where(has_parent, brought, NEVER)) + last_score
        stay_ended = total + blank_score
        stay_total = _log_add(stay_ended, stay_open)

        if SHALLOW == 2:
            chosen, value = _best_with_ngram(
                stay_total, total, ended, fused, last, parent, context, columns, column_scores, place,
                starts, table_keys, table_scores, table_backoffs, table_mask, table_probes, weight, bonus,
                K, KP, C, CP, ROOT, BOUNDARIES, ORDER, BASE,
            )  # fmt: skip
            source = tl.where(chosen < KP, chosen, (chosen - KP) // MOST_COLUMNS)
            took = tl.where(chosen < KP, -1, (chosen - KP) % MOST_COLUMNS)
        else:
            # those in the beam already are struck out: a bit for each column of their parents
            same = (piece_of[None, :] == last[:, None]).to(tl.int32)
            last_column = tl.sum(same * (column + 1)[None, :], 1) - 1
            strikes = has_parent & (last_column >= 0)
            struck_by = (parent[None, :] == slot[:, None]) & strikes[None, :]
            bit = tl.full((KP,), 1, tl.int64) << tl.maximum(last_column % 62, 0).to(tl.int64)
            low = tl.where(struck_by & (last_column < 62)[None, :], bit[None, :], 0)
            mine = from_column.to(tl.int64)
            struck = (tl.gather(tl.sum(low, 1), from_slot, 0) >> tl.maximum(mine % 62, 0)) & 1
            if WIDE:  # more than 62 columns
                high = tl.where(struck_by & (last_column >= 62)[None, :], bit[None, :], 0)
                struck_high = (tl.gather(tl.sum(high, 1), from_slot, 0) >> tl.maximum(mine % 62, 0)) & 1
                struck = tl.where(mine < 62, struck, struck_high)
            new_piece = tl.load(columns + place * C + from_column, mask=extends, other=-1).to(tl.int64)
            new_score = tl.load(column_scores + place * C + from_column, mask=extends, other=NEVER)
            repeated = new_piece == tl.gather(last, from_slot, 0)
            from_mass = tl.where(repeated, tl.gather(ended, from_slot, 0), tl.gather(total, from_slot, 0))
            new_total = tl.where(extends & (struck == 0), from_mass + new_score, NEVER)
            rank = tl.where(stays, tl.gather(stay_total, from_slot, 0), new_total)
            if RANKS:
                rank = tl.where(rank == NEVER, NEVER, rank + tl.gather(fused, from_slot, 0))
            chosen, value = _of_keys(tl.topk(_keys(rank, candidate), KP))
            source = tl.load(candidate_slots + chosen)
            took = tl.load(candidate_columns + chosen)

        # the best K of all
        alive = real & (value > NEVER)
        if SCORE_BEAM:
            floor = tl.max(value, 0) - score_beam  # a skipped frame kills nobody
            alive = alive & (value >= tl.where(shift == NEVER, NEVER, floor))
        grew = alive & (took >= 0)
        piece = tl.load(columns + place * C + took, mask=grew, other=ROOT).to(tl.int64)
        old_last = tl.gather(last, source, 0)
        old_node = tl.gather(node, source, 0)
        old_content = tl.gather(content, source, 0)
        old_boundary = tl.gather(boundary, source, 0)
        taken = tl.load(column_scores + place * C + took, mask=grew, other=NEVER)
        carried = tl.where(piece == old_last, tl.gather(ended, source, 0), tl.gather(total, source, 0))
        total = tl.where(grew, carried + taken, tl.where(alive, tl.gather(stay_total, source, 0), NEVER))
        ended = tl.where(alive & ~grew, tl.gather(stay_ended, source, 0), NEVER)
        opened = tl.where(grew, total, tl.where(alive, tl.gather(stay_open, source, 0), NEVER))
        repeats = tl.where(grew, (piece == old_last).to(tl.int64), tl.gather(repeats, source, 0))
        born = ((at + 1) * batch + b) * K + slot
        node = tl.where(grew, born, old_node)
        content = tl.where(grew, (old_content * FACTOR) ^ tl.load(keys + piece), old_content)
        content = tl.where(alive, content, DEAD)
        parent_content = tl.where(grew, old_content, tl.gather(parent_content, source, 0))
        parent_content = tl.where(alive, parent_content, ORPHAN)
        last = tl.where(grew, piece, old_last)
        fused = tl.gather(fused, source, 0)
        origin = tl.gather(origin, source, 0)
        grew_ever = (tl.gather(grew_ever.to(tl.int32), source, 0) != 0) | grew
        tl.store(parents + born, old_node, mask=grew)
        tl.store(pieces + born, piece, mask=grew)
        length = tl.gather(length, source, 0)
        begins = slot < 0  # there are no words
        starting = begins
        boundary = old_boundary
        if BOUNDARIES:
            starting = grew & (tl.load(starts + piece) != 0)
            boundary = tl.where(starting, old_node, old_boundary)
            tl.store(boundaries + born, boundary, mask=grew)
            begins = starting | (grew & (old_last == ROOT))  # the first piece begins a word, marked or not
        if ORDER > 0:
            old_context = tl.gather(context, source, 0)
            gain = _estimate(
                old_context, piece, grew, table_keys, table_scores, table_backoffs,
                table_mask, table_probes, ORDER, BASE,
            )  # fmt: skip
            gain = tl.where(grew, gain, 0.0)
            longer = (old_context * (BASE + 1) + piece + 1) % (BASE + 1) ** (ORDER - 1)
            context = tl.where(grew, longer, old_context)
            weighed = weight * gain + bonus * begins.to(tl.float32)
            if SHALLOW > 0:
                gained = tl.gather(gained, source, 0) + gain
                words = tl.gather(words, source, 0) + begins.to(tl.int64)
                fused += weighed
            if AHEAD_EVERY > 0:
                old_ahead = tl.gather(ahead, source, 0)
                scored = tl.gather(scored, source, 0)
                given = tl.gather(given, source, 0)
                closed = tl.where(starting, old_ahead, tl.gather(closed, source, 0))
                ahead = old_ahead + weighed
        length += (begins if UNIT == 1 else grew).to(tl.int64)

        at += 1
        searched = shift > NEVER
        done += searched.to(tl.int64)
        if searched & (done % RESCALE == 0):
            best = tl.max(total, 0)
            best = tl.where(best > NEVER, best, 0.0)
            total -= best
            ended -= best
            opened -= best
            offset += best.to(tl.float64)
        if PACED:
            look = at % pace_every == 0
            if UNIT == 0:
                fired = look
            else:
                shortest = tl.min(tl.where(alive, length, 1 << 40), 0)
                fired = look & (shortest > longest) & (shortest < (1 << 40))
                longest = tl.where(fired, shortest, longest)
            if AHEAD_EVERY > 0:
                update = ~fired & (at % AHEAD_EVERY == 0)
                now = ahead - scored
                fused = tl.where(update, fused + (now - given), fused)
                given = tl.where(update, now, given)

    tl.store(state, node)
    tl.store(state + KP, boundary)
    tl.store(state + 2 * KP, last)
    tl.store(state + 3 * KP, content)
    tl.store(state + 4 * KP, parent_content)
    tl.store(state + 5 * KP, repeats)
    tl.store(state + 6 * KP, length)
    tl.store(state + 7 * KP, context)
    tl.store(mass, total)
    tl.store(mass + KP, ended)
    tl.store(mass + 2 * KP, opened)
    tl.store(mass + 3 * KP, fused)
    tl.store(mass + 4 * KP, ahead)
    tl.store(mass + 5 * KP, closed)
    tl.store(mass + 6 * KP, scored)
    tl.store(mass + 7 * KP, given)
    tl.store(counts + b * W, at)
    tl.store(counts + b * W + 1, fired.to(tl.int64))
    tl.store(counts + b * W + 2, longest)
    tl.store(counts + b * W + 3, done)
    tl.store(offsets + b, offset)
    tl.store(sources + b * K + slot, origin.to(tl.int64), mask=real)
    tl.store(grown + b * K + slot, grew_ever.to(tl.uint8), mask=real)
    if SHALLOW > 0:
        tl.store(opened_words + b * K + slot, words, mask=real)
        tl.store(gains + b * K + slot, gained, mask=real)
