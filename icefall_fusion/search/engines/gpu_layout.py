"""The arguments of the GPU kernel and the state of its searches, under names that host and kernel share.
Knows: names, shapes. Must not know: Triton, how a frame is searched.

Triton takes named tuples as arguments. On the host their fields are tensors; in the kernel they are pointers.
The kernel loads the state into registers, as blocks of slots under the same names. No offsets between fields
are needed, since each field is a tensor of its own. The names and their order are in the key of a compiled
kernel on disk, so a kernel is never used with another layout.

Dimensions as in search/beam.py. Also: W slots of a block (K padded to a power of two), N candidates of a
block (padded likewise).
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from icefall_fusion.search.beam import Beam

MOST_COLUMNS = 1024  # of a search whose extensions are scored by an n-gram or phrases
BUCKET = 4  # cells: 32 bytes of keys, which a GPU reads at once
STAY, NO_CANDIDATE = -1, -2  # see Candidates


class Prefix(NamedTuple):
    """The prefix of each slot: [B, W] int64.

    node: in the arena; boundary: node of the closed words; last: last piece, blank at the root.
    hash, parent_hash: see Beam; repeats: 1 if the last two pieces are equal.
    length: words or pieces begun, whichever the stop rule counts.
    """

    node: Any
    boundary: Any
    last: Any
    hash: Any
    parent_hash: Any
    repeats: Any
    length: Any


class Mass(NamedTuple):
    """The scores of each slot: [B, W] float32, natural logs.

    total, blank, nonblank: masses of all alignments, of those that end in blank, of the others, relative to
    the utterance's offset.
    fused: weighted scores of the fusions, see Beam.
    """

    total: Any
    blank: Any
    nonblank: Any
    fused: Any


class Ahead(NamedTuple):
    """The look-ahead of each slot: [B, W] float32, weighted scores of the n-gram with word bonus.

    whole: of the prefix; closed: of its closed words; scored: of the words that a fusion has scored.
    estimate: the look-ahead's share of ``Mass.fused``.
    """

    whole: Any
    closed: Any
    scored: Any
    estimate: Any


class Counts(NamedTuple):
    """The progress of each utterance: [B] int64.

    at: frames passed; fired: 1 if the stop rule stopped it after the last one.
    longest: length of its shortest hypothesis at the last stop; searched: frames passed and not skipped.
    """

    at: Any
    fired: Any
    longest: Any
    searched: Any


class Changes(NamedTuple):
    """How each slot changed in one launch: [B, K], written at its end.

    source: int64, the slot it comes from; grew: bool; words: int64, words begun; gain: float32, raw score of
    the n-gram; paid: float32, raw score of the phrases.
    """

    source: Any
    grew: Any
    words: Any
    gain: Any
    paid: Any


class State(NamedTuple):
    """All that a search carries from frame to frame.

    context: [B, W] int64, the last pieces of each prefix for the n-gram: a number in base ``Form.base + 1``,
    whose digits are ids + 1 (0: none), the last piece lowest.
    phrase: [B, W] int32, node of each prefix in the phrases of its utterance.
    offset: [B] float64, see Beam.
    """

    prefix: Prefix
    mass: Mass
    context: Any
    phrase: Any
    ahead: Ahead
    counts: Counts
    offset: Any
    changes: Changes


class Frames(NamedTuple):
    """Prepared frames, see candidates.Frames: blank, shift [T, B]; piece [T, B, C] int32; score [T, B, C]."""

    blank: Any
    shift: Any
    piece: Any
    score: Any


class Candidates(NamedTuple):
    """The stays and extensions that compete in each frame: [N] int32.

    slot: the slot that stays or is extended; column: of the frame's piece that extends it, `STAY`, or
    `NO_CANDIDATE` for padding.
    """

    slot: Any
    column: Any


class Pieces(NamedTuple):
    """The vocabulary: key [V] int64 of the hash; starts_word [V] bool, None where there are no words."""

    key: Any
    starts_word: Any


class Arena(NamedTuple):
    """The nodes that the search writes: [rows, B, K] int64, see PrefixArena."""

    parent: Any
    piece: Any
    boundary: Any


class Ngram(NamedTuple):
    """An n-gram as one hash table, see gpu_ngram.py. Without an n-gram there are no tables.

    key: [cells] int64, -1 in empty cells; score, backoff: [cells] float32, natural logs.
    first_score, first_backoff: [base] float32, those of single pieces.
    mask: number of buckets - 1; a bucket is `BUCKET` cells.
    weight: of its score; bonus: for a word that begins.
    """

    key: Any = None
    score: Any = None
    backoff: Any = None
    first_score: Any = None
    first_backoff: Any = None
    mask: Any = 0
    weight: Any = 0.0
    bonus: Any = 0.0


class Late(NamedTuple):
    """Scores that come in late beside a look-ahead, see `CompiledSearch`: landed, scored, totals."""

    landed: Any = None
    scored: Any = None
    totals: Any = None


class Phrases(NamedTuple):
    """The phrases of all utterances, list after list, see gpu_phrases.py. Without any there are no tables.

    key: [cells] int64, -1 in empty cells; child: [cells] int32, node at the end of an edge; held: [cells]
    float32, what is on trial there.
    root_child, root_held: [lists * V], the same where there is no edge.
    pending, complete, most: [nodes] float32, see PhraseAutomaton.
    mask, cell, root, node: [B] int64, of each utterance's list: number of buckets - 1; its first cell, entry
    of the roots and node.
    weight: of the boosts; bonus: for a word that begins.
    """

    key: Any = None
    child: Any = None
    held: Any = None
    root_child: Any = None
    root_held: Any = None
    pending: Any = None
    complete: Any = None
    most: Any = None
    mask: Any = None
    cell: Any = None
    root: Any = None
    node: Any = None
    weight: Any = 0.0
    bonus: Any = 0.0


@dataclass(frozen=True)
class Form:
    """The constants that a kernel is compiled for.

    slots: K; width: W; columns: C; candidates: N; blank: id of blank.
    column_block: columns of a block: all, or those tried at once if an n-gram or phrases rank extensions.
    ranks: whether scores of fusions rank the slots; score_beam: whether there is one.
    stops: whether utterances run on to their next stop; unit: StopRule.code.
    words: whether pieces begin words.
    order, base: of the n-gram, see NgramOrder; order 0: none. The base is that of keys of phrases, too.
    shallow: 2: the n-gram ranks extensions; 1: its scores are only recorded; 0: it serves the look-ahead.
    phrases: 2: they rank extensions; 1: their scores are only recorded; 0: there are none.
    ahead_every: frames between two updates of the look-ahead; 0: none.
    late: whether scores come in late beside it.
    """

    slots: int
    width: int
    columns: int
    column_block: int
    candidates: int
    blank: int
    ranks: bool
    stops: bool
    unit: int
    words: bool
    score_beam: bool
    order: int
    base: int
    shallow: int
    phrases: int
    ahead_every: int
    late: bool


def root_state(beam: Beam, width: int, changes: Changes, context: int, length: int) -> State:
    """Return the state before the first frame.

    Args:
        beam: at the root.
        width: W.
        changes: tensors that the kernel writes.
        context: of the n-gram at the beginning of a sentence.
        length: the length that counts as scored, see StopRule.first_length.
    """
    (batch, slots), device = beam.node.shape, beam.lens.device

    def rows(kind: Any, dtype: torch.dtype, value: float, *shape: int) -> Any:
        return kind(*torch.full((len(kind._fields), *shape), value, dtype=dtype, device=device))

    prefix = rows(Prefix, torch.int64, 0, batch, width)
    prefix.node[:] = prefix.boundary[:] = beam.node[:, :1]
    prefix.last[:] = beam.blank
    prefix.hash[:, :slots] = beam.hash
    prefix.parent_hash[:] = beam.parent_hash[:, :1]
    mass = rows(Mass, torch.float32, -torch.inf, batch, width)
    mass.total[:, 0] = mass.blank[:, 0] = 0.0
    mass.fused[:] = 0.0
    ahead = rows(Ahead, torch.float32, 0.0, batch, width)
    # each in memory of its own, for the address of each must be a multiple of 16 bytes in batches of any size
    counts = Counts(*(torch.zeros(batch, dtype=torch.int64, device=device) for _ in Counts._fields))
    counts.longest[:] = length
    contexts = torch.full((batch, width), context, device=device)
    nodes = torch.zeros(batch, width, dtype=torch.int32, device=device)
    return State(prefix, mass, contexts, nodes, ahead, counts, beam.offset, changes)
