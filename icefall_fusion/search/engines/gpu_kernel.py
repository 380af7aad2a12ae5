"""The prefix search as one GPU kernel: each program searches one utterance, many frames in one launch.
Knows: Triton, the kernel's arguments. Must not know: beams, fusions, where the arguments come from.

It computes what frame_step.py and candidates.py compute, in natural-log masses as they do. The kernel is
`search_utterances` at the end of the file. It loads the state of an utterance (gpu_layout.State) into
registers and keeps it there from frame to frame. It waits neither for the host nor for another program. Each
role in a frame is a function: sort, merge, choose the best, prune, extend, rescale, stop. Triton inlines them
all. The ``form`` is known at compile time, so a feature that it lacks costs nothing. Only gpu.py imports this
file, because it needs Triton.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from icefall_fusion.search.beam import DEAD_HASH, HASH_FACTOR, NO_PARENT_HASH, ROUNDING
from icefall_fusion.search.engines import gpu_layout
from icefall_fusion.search.engines.base import RESCALE_EVERY
from icefall_fusion.search.engines.gpu_layout import (
    Ahead,
    Candidates,
    Changes,
    Counts,
    Mass,
    Phrases,
    Prefix,
    State,
)

NEVER = tl.constexpr(float("-inf"))
DEAD, ORPHAN = tl.constexpr(DEAD_HASH), tl.constexpr(NO_PARENT_HASH)
SLACK = tl.constexpr(ROUNDING)
FACTOR = tl.constexpr(HASH_FACTOR)
RESCALE = tl.constexpr(RESCALE_EVERY)
LAST_PLACE = tl.constexpr(0x7FFFFFFF)
FAR = tl.constexpr(1 << 40)  # pieces, more than any hypothesis has
BITS = tl.constexpr(62)  # columns that one number marks
STAY = tl.constexpr(gpu_layout.STAY)
MOST_COLUMNS = tl.constexpr(gpu_layout.MOST_COLUMNS)
BUCKET = tl.constexpr(gpu_layout.BUCKET)


class Frame(NamedTuple):
    """One frame of one utterance, see candidates.Frames; log_probs, piece and score are pointers."""

    blank: Any
    shift: Any
    log_probs: Any
    piece: Any
    score: Any


# -- scores as sortable keys


@triton.jit
def log_add(one, other):
    """Return log(exp(one) + exp(other))."""
    high = tl.maximum(one, other)
    low = tl.minimum(one, other)
    below = tl.where(low == NEVER, NEVER, low - tl.where(low == NEVER, 0.0, high))
    return high + tl.log(1.0 + tl.exp(below))


@triton.jit
def ranked(mass, fused):
    """Return the scores that rank: a dead slot stays dead, whatever the fusions add."""
    return tl.where(mass == NEVER, NEVER, mass + fused)


@triton.jit
def to_keys(score, place):
    """Return int64 keys that sort by score, and at equal scores with the earlier place as the larger key."""
    bits = score.to(tl.int32, bitcast=True)
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (rising.to(tl.int64) << 32) | (place ^ LAST_PLACE).to(tl.int64)


@triton.jit
def from_keys(keys):
    """Return the places and the scores of keys."""
    rising = (keys >> 32).to(tl.int32)
    bits = rising ^ ((rising >> 31) & 0x7FFFFFFF)
    return (keys & LAST_PLACE).to(tl.int32) ^ LAST_PLACE, bits.to(tl.float32, bitcast=True)


# -- the state, in memory and in registers


@triton.jit
def load_state(stored, b, form: tl.constexpr):
    """Return the state of utterance ``b``, with nothing changed in this launch."""
    slot = tl.arange(0, form.width)
    at = b * form.width + slot
    counts = stored.counts
    return State(
        Prefix(*[tl.load(row + at) for row in stored.prefix]),
        Mass(*[tl.load(row + at) for row in stored.mass]),
        tl.load(stored.context + at),
        tl.load(stored.phrase + at),
        Ahead(*[tl.load(row + at) for row in stored.ahead]),
        Counts(
            tl.load(counts.at + b), tl.load(counts.fired + b) != 0,
            tl.load(counts.longest + b), tl.load(counts.searched + b),
        ),
        tl.load(stored.offset + b),
        Changes(
            slot, slot * 0, tl.full((form.width,), 0, tl.int64), tl.full((form.width,), 0.0, tl.float32),
            tl.full((form.width,), 0.0, tl.float32),
        ),
    )


@triton.jit
def store_rows(stored, rows, at, mask):
    """Write each field of a named tuple to the pointer of the same field."""
    for i in tl.static_range(len(rows)):
        tl.store(stored[i] + at, rows[i], mask=mask)


@triton.jit
def store_state(stored, state, b, form: tl.constexpr):
    """Write the state of utterance ``b``, without the fields that the form does not use."""
    slot = tl.arange(0, form.width)
    at = b * form.width + slot
    real = slot < form.slots
    store_rows(stored.prefix, state.prefix, at, None)
    store_rows(stored.mass, state.mass, at, None)
    if form.order > 0:
        tl.store(stored.context + at, state.context)
    if form.phrases > 0:
        tl.store(stored.phrase + at, state.phrase)
        tl.store(stored.changes.paid + b * form.slots + slot, state.changes.paid, mask=real)
    if form.ahead_every > 0:
        store_rows(stored.ahead, state.ahead, at, None)
    store_rows(stored.counts, state.counts, b, None)
    tl.store(stored.offset + b, state.offset)
    tl.store(stored.changes.source + b * form.slots + slot, state.changes.source, mask=real)
    tl.store(stored.changes.grew + b * form.slots + slot, state.changes.grew, mask=real)
    if form.shallow > 0 or form.phrases > 0:
        tl.store(stored.changes.words + b * form.slots + slot, state.changes.words, mask=real)
    if form.shallow > 0:
        tl.store(stored.changes.gain + b * form.slots + slot, state.changes.gain, mask=real)


@triton.jit
def follow(state, source, form: tl.constexpr):
    """Return the state in which each slot is what slot ``source`` was."""
    context, phrase, ahead, changes = state.context, state.phrase, state.ahead, state.changes
    words, gain, paid = changes.words, changes.gain, changes.paid
    if form.order > 0:
        context = tl.gather(context, source, 0)
    if form.ahead_every > 0:
        ahead = Ahead(*[tl.gather(row, source, 0) for row in ahead])
    if form.shallow > 0 or form.phrases > 0:
        words = tl.gather(words, source, 0)
    if form.shallow > 0:
        gain = tl.gather(gain, source, 0)
    if form.phrases > 0:
        phrase = tl.gather(phrase, source, 0)
        paid = tl.gather(paid, source, 0)
    return State(
        Prefix(*[tl.gather(row, source, 0) for row in state.prefix]),
        Mass(*[tl.gather(row, source, 0) for row in state.mass]),
        context,
        phrase,
        ahead,
        state.counts,
        state.offset,
        Changes(tl.gather(changes.source, source, 0), tl.gather(changes.grew, source, 0), words, gain, paid),
    )


@triton.jit
def sort(state, form: tl.constexpr):
    """Sort the slots by score, as the choice of candidates requires. Fusions leave them in any order."""
    score = ranked(state.mass.total, state.mass.fused)
    order, _ = from_keys(tl.sort(to_keys(score, tl.arange(0, form.width)), descending=True))
    return follow(state, order, form)


# -- the n-gram and the phrases


@triton.jit
def look_up(table, key, wanted):
    """Return the cell of each key in a hash table, -1 where it has none. All loads are independent."""
    mixed = key * FACTOR
    one = ((mixed ^ (mixed >> 29)) & table.mask) * BUCKET
    two = ((mixed >> 40) & table.mask) * BUCKET
    cell = tl.full(key.shape, -1, tl.int64)
    for i in tl.static_range(BUCKET):
        cell = tl.where(tl.load(table.key + one + i, mask=wanted, other=-1) == key, one + i, cell)
        cell = tl.where(tl.load(table.key + two + i, mask=wanted, other=-1) == key, two + i, cell)
    return cell


@triton.jit
def backoffs_of(ngram, context, wanted, form: tl.constexpr):
    """Return the back-off weight of the last 1, 2, ... pieces of each context, 0 where there is none."""
    history = context * 0
    backoffs = ()
    order: tl.constexpr = form.order
    for length in tl.static_range(1, order):
        before = context % (form.base + 1) - 1
        context = context // (form.base + 1)
        wanted = wanted & (before >= 0)
        history = history + tl.maximum(before, 0) * form.base ** (length - 1)
        if length == 1:
            backoff = tl.load(ngram.first_backoff + history, mask=wanted, other=0.0)
        else:
            cell = look_up(ngram, history * 16 + length, wanted)
            backoff = tl.load(ngram.backoff + cell, mask=cell >= 0, other=0.0)
        backoffs = backoffs + (backoff,)
    return backoffs


@triton.jit
def score_piece(ngram, context, backoffs, piece, wanted, form: tl.constexpr):
    """Return natural-log P(piece | context), as PieceNgram.score does; ``backoffs`` are the context's."""
    scores = tl.load(ngram.first_score + piece, mask=wanted, other=0.0)
    history = piece * 0
    order: tl.constexpr = form.order
    for length in tl.static_range(1, order):
        before = context % (form.base + 1) - 1
        context = context // (form.base + 1)
        wanted = wanted & (before >= 0)
        history = history + tl.maximum(before, 0) * form.base ** (length - 1)
        cell = look_up(ngram, (history * form.base + piece) * 16 + length + 1, wanted)
        longer = tl.load(ngram.score + cell, mask=cell >= 0, other=0.0)
        scores = tl.where(cell >= 0, longer, scores + backoffs[length - 1])
    return scores


@triton.jit
def own_phrases(phrases, b):
    """Return the phrases of utterance ``b``: pointers to where its list begins."""
    cell = tl.load(phrases.cell + b)
    root = tl.load(phrases.root + b)
    node = tl.load(phrases.node + b)
    return Phrases(
        phrases.key + cell, phrases.child + cell, phrases.held + cell,
        phrases.root_child + root, phrases.root_held + root,
        phrases.pending + node, phrases.complete + node, phrases.most + node,
        tl.load(phrases.mask + b), cell, root, node, phrases.weight, phrases.bonus,
    )


@triton.jit
def follow_phrases(phrases, node, piece, wanted, form: tl.constexpr):
    """Return the node after each node and piece, and what is on trial there."""
    root = tl.load(phrases.root_child + piece, mask=wanted, other=0)
    held = tl.load(phrases.root_held + piece, mask=wanted, other=0.0)
    cell = look_up(phrases, node.to(tl.int64) * form.base + piece, wanted)
    child = tl.load(phrases.child + cell, mask=cell >= 0, other=0)
    at_child = tl.load(phrases.held + cell, mask=cell >= 0, other=0.0)
    return tl.where(cell >= 0, child, root), tl.where(cell >= 0, at_child, held)


@triton.jit
def most_paid(phrases, node, alive):
    """Return the most that phrases may add to any extension of each slot, at least 0."""
    most = phrases.weight * tl.load(phrases.most + node, mask=alive, other=0.0)
    return tl.maximum(phrases.bonus, 0.0) + tl.maximum(most, 0.0)


# -- the roles of a frame


@triton.jit
def read_frame(row, frames, at, b, form: tl.constexpr):
    """Return frame ``at`` of utterance ``b``; ``row`` points to its log-probs."""
    place = at * tl.num_programs(0) + b
    return Frame(
        tl.load(frames.blank + place),
        tl.load(frames.shift + place),
        row,
        frames.piece + place * form.columns,
        frames.score + place * form.columns,
    )


@triton.jit
def merge(prefix, mass, frame, form: tl.constexpr):
    """Return the masses of the slots that stay, and the slot of each one's parent (-1: not in the beam).

    If a slot's parent is in the beam, its extension by the slot's last piece is the same prefix as the slot.
    The mass of that extension is added here.
    """
    slot = tl.arange(0, form.width)
    linked = (prefix.parent_hash[:, None] == prefix.hash[None, :]).to(tl.int32)
    parent = tl.sum(linked * (slot + 1)[None, :], 1) - 1
    at_parent = tl.maximum(parent, 0)
    repeated = tl.gather(mass.blank, at_parent, 0)
    brought = tl.where(prefix.repeats != 0, repeated, tl.gather(mass.total, at_parent, 0))
    last_score = tl.load(frame.log_probs + prefix.last) + frame.shift
    nonblank = log_add(mass.nonblank, tl.where(parent >= 0, brought, NEVER)) + last_score
    blank = mass.total + frame.blank
    return Mass(log_add(blank, nonblank), blank, nonblank, mass.fused), parent


@triton.jit
def struck(prefix, parent, frame, candidates, form: tl.constexpr):
    """Return which candidates are prefixes of the beam already, so that `merge` has added their mass.

    Each slot strikes out one column of its parent. An int64 per slot has a bit for each column struck out.
    """
    slot = tl.arange(0, form.width)
    column = tl.arange(0, form.column_block)
    piece = tl.load(frame.piece + column, mask=column < form.columns, other=-1).to(tl.int64)
    same = (piece[None, :] == prefix.last[:, None]).to(tl.int32)
    last_column = tl.sum(same * (column + 1)[None, :], 1) - 1
    strikes = (parent >= 0) & (last_column >= 0)
    by = (parent[None, :] == slot[:, None]) & strikes[None, :]
    bit = tl.full((form.width,), 1, tl.int64) << tl.maximum(last_column % BITS, 0).to(tl.int64)
    low = tl.sum(tl.where(by & (last_column < BITS)[None, :], bit[None, :], 0), 1)
    mine = candidates.column.to(tl.int64)
    marked = (tl.gather(low, candidates.slot, 0) >> tl.maximum(mine % BITS, 0)) & 1
    if form.columns > BITS:
        high = tl.sum(tl.where(by & (last_column >= BITS)[None, :], bit[None, :], 0), 1)
        marked_high = (tl.gather(high, candidates.slot, 0) >> tl.maximum(mine % BITS, 0)) & 1
        marked = tl.where(mine < BITS, marked, marked_high)
    return marked != 0


@triton.jit
def best(prefix, mass, stay, parent, frame, candidates, form: tl.constexpr):
    """Return the best W candidates and their scores, best first."""
    extends = candidates.column >= 0
    piece = tl.load(frame.piece + candidates.column, mask=extends, other=-1).to(tl.int64)
    score = tl.load(frame.score + candidates.column, mask=extends, other=NEVER)
    repeated = piece == tl.gather(prefix.last, candidates.slot, 0)
    blank = tl.gather(mass.blank, candidates.slot, 0)
    carried = tl.where(repeated, blank, tl.gather(mass.total, candidates.slot, 0))
    out = struck(prefix, parent, frame, candidates, form)
    total = tl.where(extends & ~out, carried + score, NEVER)
    total = tl.where(candidates.column == STAY, tl.gather(stay.total, candidates.slot, 0), total)
    if form.ranks:
        total = ranked(total, tl.gather(mass.fused, candidates.slot, 0))
    candidate = tl.arange(0, form.candidates)
    return from_keys(tl.topk(to_keys(total, candidate), form.width))


@triton.jit
def last_score(keys, form: tl.constexpr):
    """Return the score of the last of K sorted keys."""
    return tl.max(tl.where(tl.arange(0, form.width) == form.slots - 1, from_keys(keys)[1], NEVER), 0)


@triton.jit
def best_with_scores(state, stay, parent, frame, pieces, ngram, phrases, form: tl.constexpr):
    """Return slot, column (or `STAY`) and score of the best W stays and extensions, with the scores that the
    n-gram and the phrases give to extensions.

    Columns are tried in blocks, the most probable pieces first, until no piece could enter the beam even if
    the n-gram gave it probability 1 and the phrases the most that they can. In the keys, place k is the stay
    of slot k, and place W + k * MOST_COLUMNS + c is its extension by column c.
    """
    prefix, mass = state.prefix, state.mass
    slot = tl.arange(0, form.width)
    entry = tl.arange(0, form.width * form.column_block)
    from_slot = entry // form.column_block
    last = tl.gather(prefix.last, from_slot, 0)
    total = tl.gather(mass.total, from_slot, 0)
    blank = tl.gather(mass.blank, from_slot, 0)
    fused = tl.gather(mass.fused, from_slot, 0)
    context = tl.gather(state.context, from_slot, 0)
    backoffs = ()
    if form.shallow == 2:
        of_slots = backoffs_of(ngram, state.context, mass.total > NEVER, form)
        order: tl.constexpr = form.order
        for length in tl.static_range(1, order):
            backoffs = backoffs + (tl.gather(of_slots[length - 1], from_slot, 0),)
    if form.phrases == 2:
        alive = mass.total > NEVER
        node = tl.gather(state.phrase, from_slot, 0)
        pending = tl.gather(tl.load(phrases.pending + state.phrase, mask=alive, other=0.0), from_slot, 0)
        complete = tl.gather(tl.load(phrases.complete + state.phrase, mask=alive, other=0.0), from_slot, 0)
    links = tl.where(parent >= 0, parent.to(tl.int64) * form.base + prefix.last, -1)  # extensions in the beam
    kept = tl.sort(to_keys(ranked(stay.total, mass.fused), slot), descending=True)
    reach = ranked(mass.total, mass.fused)
    if form.phrases == 2:
        reach += most_paid(phrases, state.phrase, alive)
    most = tl.max(reach, 0) + tl.maximum(ngram.bonus, 0.0) + SLACK
    first = state.counts.at * 0
    score = tl.load(frame.score)
    floor = last_score(kept, form)
    while (first < form.columns) & (score > NEVER) & (most + score >= floor):
        column = first + entry % form.column_block
        there = column < form.columns
        piece = tl.load(frame.piece + column, mask=there, other=form.blank).to(tl.int64)
        extended = tl.where(piece == last, blank, total)
        extended += tl.load(frame.score + column, mask=there, other=NEVER)
        link = from_slot.to(tl.int64) * form.base + piece
        out = tl.sum((link[:, None] == links[None, :]).to(tl.int32), 1) > 0
        hopeful = there & ~out & (extended > NEVER)
        if form.shallow == 2:
            gain = ngram.weight * score_piece(ngram, context, backoffs, piece, hopeful, form)
        else:
            gain = tl.full(piece.shape, 0.0, tl.float32)
        if form.words:
            marked = tl.load(pieces.starts_word + piece) != 0
            begins = marked | (last == form.blank)
            if form.shallow == 2:
                gain += ngram.bonus * begins.to(tl.float32)
            if form.phrases == 2:
                _, held = follow_phrases(phrases, node, piece, hopeful, form)
                paid = held - pending + tl.where(marked, complete, 0.0)
                gain += phrases.weight * paid + phrases.bonus * begins.to(tl.float32)
        extended = tl.where(hopeful, extended + fused + gain, NEVER)
        place = (form.width + from_slot * MOST_COLUMNS + column).to(tl.int32)
        new = tl.topk(to_keys(extended, place), form.width)
        kept = tl.topk(tl.cat(kept, new, can_reorder=True), form.width)
        floor = last_score(kept, form)
        first += form.column_block
        score = tl.load(frame.score + first, mask=first < form.columns, other=NEVER)
    place, value = from_keys(kept)
    extension = place - form.width
    source = tl.where(extension < 0, place, extension // MOST_COLUMNS)
    return source, tl.where(extension < 0, STAY, extension % MOST_COLUMNS), value


@triton.jit
def prune(value, frame, score_beam, form: tl.constexpr):
    """Return which of the best W candidates survive: at most K, none below the score beam."""
    alive = (tl.arange(0, form.width) < form.slots) & (value > NEVER)
    if form.score_beam:
        floor = tl.where(frame.shift == NEVER, NEVER, tl.max(value, 0) - score_beam)
        alive = alive & (value >= floor)  # in a skipped frame none dies
    return alive


@triton.jit
def extend(
    state, stay, source, column, alive, frame, pieces, arena, ngram, phrases, late, b, form: tl.constexpr
):
    """Return the state of the chosen candidates; write the new prefixes to the arena."""
    grew = alive & (column >= 0)
    piece = tl.load(frame.piece + column, mask=grew, other=form.blank).to(tl.int64)
    score = tl.load(frame.score + column, mask=grew, other=NEVER)
    old = follow(state, source, form)
    repeats = piece == old.prefix.last
    stayed = Mass(*[tl.gather(row, source, 0) for row in stay])
    carried = tl.where(repeats, old.mass.blank, old.mass.total) + score
    total = tl.where(grew, carried, tl.where(alive, stayed.total, NEVER))
    blank = tl.where(alive & ~grew, stayed.blank, NEVER)
    nonblank = tl.where(grew, total, tl.where(alive, stayed.nonblank, NEVER))
    mass = Mass(total, blank, nonblank, old.mass.fused)
    born = ((state.counts.at + 1) * tl.num_programs(0) + b) * form.slots + tl.arange(0, form.width)
    prefix, marked, begins = grow(old.prefix, piece, repeats, grew, alive, born, pieces, arena, form)
    context, phrase, ahead, changes = old.context, old.phrase, old.ahead, old.changes
    known = changes.grew | grew.to(tl.int32)
    changes = Changes(changes.source, known, changes.words, changes.gain, changes.paid)
    if form.order > 0:
        backoffs = backoffs_of(ngram, context, grew, form)
        gain = tl.where(grew, score_piece(ngram, context, backoffs, piece, grew, form), 0.0)
        longer = (context * (form.base + 1) + piece + 1) % (form.base + 1) ** (form.order - 1)
        context = tl.where(grew, longer, context)
        mass, ahead, changes = add_gain(mass, ahead, changes, gain, marked, begins, ngram, form)
        if form.late:
            tl.store(late.totals + born, ahead.whole, mask=grew)
    if form.phrases > 0:
        mass, phrase, changes = pay(mass, phrase, changes, piece, grew, marked, begins, phrases, form)
    return State(prefix, mass, context, phrase, ahead, state.counts, state.offset, changes)


@triton.jit
def grow(old, piece, repeats, grew, alive, born, pieces, arena, form: tl.constexpr):
    """Return the chosen prefixes, which of them grew by a piece that is marked as a word's first, and which
    began a word."""
    tl.store(arena.parent + born, old.node, mask=grew)
    tl.store(arena.piece + born, piece, mask=grew)
    marked = grew & ~grew  # there are no words
    begins = marked
    boundary = old.boundary
    if form.words:
        marked = grew & (tl.load(pieces.starts_word + piece) != 0)
        begins = marked | (grew & (old.last == form.blank))  # the first piece begins a word, marked or not
        boundary = tl.where(marked, old.node, boundary)
        tl.store(arena.boundary + born, boundary, mask=grew)
    content = tl.where(grew, (old.hash * FACTOR) ^ tl.load(pieces.key + piece), old.hash)
    parent_content = tl.where(grew, old.hash, old.parent_hash)
    prefix = Prefix(
        tl.where(grew, born, old.node),
        boundary,
        tl.where(grew, piece, old.last),
        tl.where(alive, content, DEAD),
        tl.where(alive, parent_content, ORPHAN),
        tl.where(grew, repeats.to(tl.int64), old.repeats),
        old.length + (begins if form.unit == 1 else grew).to(tl.int64),
    )
    return prefix, marked, begins


@triton.jit
def add_gain(mass, ahead, changes, gain, marked, begins, ngram, form: tl.constexpr):
    """Add the n-gram's scores of new pieces to ``fused`` (shallow fusion) or to the look-ahead."""
    weighed = ngram.weight * gain + ngram.bonus * begins.to(tl.float32)
    if form.shallow > 0:
        words = changes.words + begins.to(tl.int64)
        changes = Changes(changes.source, changes.grew, words, changes.gain + gain, changes.paid)
        mass = Mass(mass.total, mass.blank, mass.nonblank, mass.fused + weighed)
    if form.ahead_every > 0:
        closed = tl.where(marked, ahead.whole, ahead.closed)
        ahead = Ahead(ahead.whole + weighed, closed, ahead.scored, ahead.estimate)
    return mass, ahead, changes


@triton.jit
def pay(mass, phrase, changes, piece, grew, marked, begins, phrases, form: tl.constexpr):
    """Let phrases go on by new pieces, and add the change of their boosts to ``fused``."""
    pending = tl.load(phrases.pending + phrase, mask=grew, other=0.0)
    complete = tl.load(phrases.complete + phrase, mask=marked, other=0.0)
    node, held = follow_phrases(phrases, phrase, piece, grew, form)
    paid = tl.where(grew, held - pending + complete, 0.0)
    weighed = phrases.weight * paid + phrases.bonus * begins.to(tl.float32)
    mass = Mass(mass.total, mass.blank, mass.nonblank, mass.fused + weighed)
    words = changes.words
    if form.shallow == 0:  # else they are counted
        words += begins.to(tl.int64)
    changes = Changes(changes.source, changes.grew, words, changes.gain, changes.paid + paid)
    return mass, tl.where(grew, node, phrase), changes


@triton.jit
def estimate_ahead(mass, ahead, when):
    """Where ``when``: make ``fused`` hold the look-ahead's estimate of the words that are not scored."""
    now = ahead.whole - ahead.scored
    fused = tl.where(when, mass.fused + (now - ahead.estimate), mass.fused)
    ahead = Ahead(ahead.whole, ahead.closed, ahead.scored, tl.where(when, now, ahead.estimate))
    return Mass(mass.total, mass.blank, mass.nonblank, fused), ahead


@triton.jit
def rescale(mass, offset, due):
    """If ``due``, make the best mass 0 and put the difference into the offset, to keep float32 exact."""
    if due:
        most = tl.max(mass.total, 0)
        most = tl.where(most > NEVER, most, 0.0)
        mass = Mass(mass.total - most, mass.blank - most, mass.nonblank - most, mass.fused)
        offset += most.to(tl.float64)
    return mass, offset


@triton.jit
def stop(counts, length, alive, every, form: tl.constexpr):
    """Apply the stop rule, see StopRule."""
    fired = counts.at % every == 0
    longest = counts.longest
    if form.unit != 0:
        shortest = tl.min(tl.where(alive, length, FAR), 0)
        fired = fired & (shortest > longest) & (shortest < FAR)
        longest = tl.where(fired, shortest, longest)
    return Counts(counts.at, fired, longest, counts.searched)


@triton.jit
def end_frame(state, alive, frame, every, form: tl.constexpr):
    """Count the frame; rescale, stop and update the look-ahead when they are due."""
    counts, ahead = state.counts, state.ahead
    real = frame.shift > NEVER
    searched = counts.searched + real.to(tl.int64)
    counts = Counts(counts.at + 1, counts.fired, counts.longest, searched)
    mass, offset = rescale(state.mass, state.offset, real & (searched % RESCALE == 0))
    if form.stops:
        counts = stop(counts, state.prefix.length, alive, every, form)
        if form.ahead_every > 0:
            due = ~counts.fired & (counts.at % form.ahead_every == 0)
            mass, ahead = estimate_ahead(mass, ahead, due)
    return State(state.prefix, mass, state.context, state.phrase, ahead, counts, offset, state.changes)


@triton.jit
def go_on(state, late, b, form: tl.constexpr):
    """Return the state after a stop: the fusion has scored what was closed, or as ``late`` tells."""
    counts, mass, ahead = state.counts, state.mass, state.ahead
    if form.ahead_every > 0:
        if form.late:
            slot = tl.arange(0, form.width)
            told = tl.load(late.scored + b * form.slots + slot, mask=slot < form.slots, other=0.0)
            landed = tl.load(late.landed + b) != 0
            scored = tl.where(landed, told, ahead.scored)
            when = landed | (counts.fired & (counts.at % form.ahead_every == 0))
        else:
            scored = tl.where(counts.fired, ahead.closed, ahead.scored)
            when = counts.fired
        ahead = Ahead(ahead.whole, ahead.closed, scored, ahead.estimate)
        mass, ahead = estimate_ahead(mass, ahead, when)
    counts = Counts(counts.at, counts.at < 0, counts.longest, counts.searched)
    return State(state.prefix, mass, state.context, state.phrase, ahead, counts, state.offset, state.changes)


# Triton compiles a kernel anew for integers that are 1 or a multiple of 16, and for aligned pointers, unless
# they are named here. Fields of named tuples cannot be named: what varies among searches is an argument.
# The candidates are always aligned. But where the compiler knows it, each thread loads four neighbours and
# keeps four in all that is done with candidates. That takes up to 90 registers more.
@triton.jit(do_not_specialize=["row_stride", "frame_stride", "until", "every"],
            do_not_specialize_on_alignment=["log_probs", "lens", "slots", "columns"])
def search_utterances(
    log_probs, row_stride, frame_stride, lens, slots, columns, frames, pieces, arena, ngram, phrases, late,
    stored, until, every, score_beam, form: tl.constexpr,
):
    """Search each utterance on, up to frame ``until`` or its end, or where ``form.stops`` to its next stop.

    Args:
        log_probs: [B, T, V] float32; row_stride, frame_stride: of utterances and frames.
        lens: [B] int64, frames of each utterance.
        slots, columns: [N] int32, see Candidates.
        frames, pieces, arena, ngram, phrases, late, stored: see gpu_layout, names as there; stored: State.
        until: frames; every: frames between two looks of the stop rule; score_beam: nats; form: Form.
    """
    b = tl.program_id(0)
    candidate = tl.arange(0, form.candidates)
    candidates = Candidates(tl.load(slots + candidate), tl.load(columns + candidate))
    end = tl.minimum(tl.load(lens + b), until)
    state = go_on(load_state(stored, b, form), late, b, form)
    if form.phrases > 0:
        phrases = own_phrases(phrases, b)
    disordered = state.counts.at >= 0
    while (state.counts.at < end) & ~state.counts.fired:
        if form.ranks:
            if disordered:
                state = sort(state, form)
            disordered = (form.ahead_every > 0) & (state.counts.at >= 0)
        row = log_probs + b.to(tl.int64) * row_stride + state.counts.at * frame_stride
        frame = read_frame(row, frames, state.counts.at, b, form)
        stay, parent = merge(state.prefix, state.mass, frame, form)
        if form.shallow == 2 or form.phrases == 2:
            source, column, value = best_with_scores(state, stay, parent, frame, pieces, ngram, phrases, form)
        else:
            chosen, value = best(state.prefix, state.mass, stay, parent, frame, candidates, form)
            source, column = tl.load(slots + chosen), tl.load(columns + chosen)
        alive = prune(value, frame, score_beam, form)
        state = extend(
            state, stay, source, column, alive, frame, pieces, arena, ngram, phrases, late, b, form
        )
        state = end_frame(state, alive, frame, every, form)
    store_state(stored, state, b, form)
