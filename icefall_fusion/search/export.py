"""From the last beam to N-best lists: one copy from the device, and each hypothesis made when it is read.
Knows: beams, vocabularies, word times. Must not know: how a frame is searched, language models.

What all lists need is done at once with arrays: traced prefixes, scores, their order, the frames of pieces.
Words, times and dictionaries of scores are made for those hypotheses alone that somebody looks at.
"""
from __future__ import annotations

import functools
from collections.abc import Sequence as SequenceClass
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional, Sequence

import numpy as np
import torch

from icefall_fusion.common.checks import check
from icefall_fusion.nbest import TOTAL, WORDS, Hypothesis, NBest, WordTime

if TYPE_CHECKING:
    from torch import Tensor

    from icefall_fusion.search.beam import Beam
    from icefall_fusion.search.fusion import Fusion
    from icefall_fusion.search.search_input import SearchInput
    from icefall_fusion.text.tokens import AcousticTokens


class _Found(NamedTuple):
    """The n live hypotheses of a batch.

    pieces: [n, longest] int32, -1 after the end; lengths: [n].
    peaks: [n, longest] int32, frame of each piece, or None.
    scores: [n] float64 a source, ``total`` last; without ``words`` where nothing weighs them.
    frame_shift: seconds per frame, None for no word times.
    """

    pieces: np.ndarray
    lengths: np.ndarray
    peaks: Optional[np.ndarray]
    scores: dict[str, np.ndarray]
    tokens: Optional[AcousticTokens]
    frame_shift: Optional[float]

    def ids(self, row: int) -> list[int]:
        """Return the pieces of a hypothesis."""
        return self.pieces[row, : self.lengths[row]].tolist()

    def hypothesis(self, row: int) -> Hypothesis:
        """Make a hypothesis."""
        ids, tokens = self.ids(row), self.tokens
        scores = {source: float(values[row]) for source, values in self.scores.items()}
        if tokens is None:
            return Hypothesis(ids, "", scores)
        spans = tokens.word_spans(ids)
        words, total = tokens.words(ids, spans), scores.pop(TOTAL)
        scores.update({WORDS: float(len(words)), TOTAL: total})
        times = []
        if self.peaks is not None and self.frame_shift is not None:
            times = word_times(words, spans, self.peaks[row].tolist(), self.frame_shift)
        return Hypothesis(ids, " ".join(words), scores, times)


class Hypotheses(SequenceClass):
    """The hypotheses of one utterance, each made when it is first read; equal to the list of them.

    A slice is a list, and a copy or pickle too.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, found: _Found, rows: Sequence[int]) -> None:
        self._found, self._rows = found, rows
        self._made: list[Optional[Hypothesis]] = [None] * len(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rank: Any) -> Any:
        if isinstance(rank, slice):
            return [self[at] for at in range(*rank.indices(len(self)))]
        made = self._made[rank]
        if made is None:
            made = self._made[rank] = self._found.hypothesis(self._rows[rank])
        return made

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, (list, Hypotheses)) else NotImplemented

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)

    def __repr__(self) -> str:
        return repr(list(self))


def export_nbests(beam: Beam, inputs: SearchInput, frame_map: Optional[Tensor], nbest: int,
                  frame_shift: Optional[float], tokens: Optional[AcousticTokens],
                  fusions: Sequence[Fusion], acoustic: str = "ctc",
                  peaks_of: Optional[Callable[..., np.ndarray]] = None) -> list[NBest]:
    """Return one N-best list per utterance, best first (ties: by pieces).

    Args:
        beam: after the last frame, its offset complete.
        frame_map: [B, n] real frame of each searched frame, or None when all were searched.
        nbest: hypotheses to return at most.
        frame_shift: seconds per frame, None for no word times.
        acoustic: source of the masses.
        peaks_of: tells the frames of pieces as `piece_peaks` does; None: that one.

    Raises:
        ValueError: a score is NaN; the message names utterance and source.
    """
    masses = beam.log_total.double() + beam.offset.unsqueeze(1)
    fields = torch.stack([beam.node.double(), masses, beam.alive.double()], 2)  # nodes are below 2^53
    values = torch.cat([fields, beam.lm.double()], 2).cpu().numpy()
    utterances, slots = values[..., 2].nonzero()
    live = values[utterances, slots]  # [n, 3 + S]
    path, lengths = beam.arena.trace(live[:, 0].astype(np.int64))
    pieces = np.where(path < 0, -1, beam.arena.on_host("piece")[path])
    peaks = None
    if frame_shift is not None and tokens is not None:
        births = path // beam.arena.row_size - 1
        if frame_map is not None and births.size:
            births = frame_map.cpu().numpy()[utterances[:, None], births.clip(0)]
        peaks_of = peaks_of or piece_peaks
        peaks = peaks_of(inputs, utterances, path, pieces, births, lengths).astype(np.int32)
    weights = {acoustic: 1.0, **{f.source: float(f.weight) for f in fusions}}
    scores = {acoustic: live[:, 1], **{f.source: live[:, 3 + s] for s, f in enumerate(fusions)}}
    if tokens is not None:
        weights[WORDS] = float(sum(f.word_bonus for f in fusions))
        if weights[WORDS] != 0:
            scores[WORDS] = count_words(pieces, tokens).astype(np.float64)
    scores[TOTAL] = _weighted(scores, weights, inputs.ids, utterances)
    found = _Found(pieces.astype(np.int32), lengths, peaks, scores, tokens, frame_shift)
    order = _best_first(found, utterances)
    ends = np.searchsorted(utterances, np.arange(len(inputs.ids) + 1)).tolist()
    rows = (order[start:stop][:nbest] for start, stop in zip(ends, ends[1:]))
    return [NBest(name, Hypotheses(found, row), dict(weights)) for name, row in zip(inputs.ids, rows)]


def _weighted(scores: dict[str, np.ndarray], weights: dict[str, float], names: Sequence[str],
              utterances: np.ndarray) -> np.ndarray:
    """Return the totals, added up in the order of the weights, a source of weight 0 left out."""
    bad = np.stack([np.isnan(values) for values in scores.values()], 1)
    for row, column in np.argwhere(bad)[:1].tolist():
        source = list(scores)[column]
        check(False, f"score {source!r} of utterance {names[utterances[row]]}", "not be NaN", float("nan"))
    total = np.zeros(len(utterances))
    for source, weight in weights.items():
        if weight != 0:
            with np.errstate(invalid="ignore"):  # infinities of both signs
                total = total + weight * scores[source]
    return total


def _best_first(found: _Found, utterances: np.ndarray) -> list[int]:
    """Return the rows of the hypotheses, utterance by utterance, by total and where it ties by pieces."""
    total = found.scores[TOTAL]
    order = np.lexsort((-total, utterances))
    best, owner = total[order], utterances[order]
    ties = ((best[1:] == best[:-1]) & (owner[1:] == owner[:-1])) | np.isnan(best[1:])
    rows = order.tolist()
    for b in np.unique(owner[1:][ties]).tolist():
        start, stop = np.searchsorted(utterances, [b, b + 1]).tolist()
        rows[start:stop] = sorted(range(start, stop), key=lambda row: (-float(total[row]), found.ids(row)))
    return rows


def count_words(pieces: np.ndarray, tokens: AcousticTokens) -> np.ndarray:
    """Return the number of words that each row of pieces spells: [n, longest], -1 after the end."""
    text = np.append(tokens.has_text, False)[pieces]  # the last one is that of -1
    word = np.append(tokens.starts_word, False)[pieces].cumsum(1) + 1
    before = np.zeros_like(word)  # the word of the last piece with text before
    before[:, 1:] = np.maximum.accumulate(np.where(text, word, 0), 1)[:, :-1]
    return (text & (word > before)).sum(1)


def word_times(words: Sequence[str], spans: Sequence[tuple[int, int]], peaks: Sequence[int],
               frame_shift: float) -> list[WordTime]:
    """Return the time of each word: from its first piece's frame to one frame past its last piece's.

    A CTC model marks the frame in which it recognizes a piece, not the beginning or end of the sound.

    Args:
        words, spans: of the hypothesis, see AcousticTokens.word_spans; peaks: frame of each piece, rising.
        frame_shift: seconds per frame.
    """
    return [
        _word_time(word, peaks[start], peaks[stop - 1], frame_shift)
        for word, (start, stop) in zip(words, spans)
    ]


@functools.lru_cache(maxsize=4096, typed=True)
def _word_time(word: str, first: int, last: int, frame_shift: float) -> WordTime:
    """Return the time of a word; the hypotheses of an utterance share most of theirs."""
    return WordTime(word, _seconds(first, frame_shift), _seconds(last + 1, frame_shift))


@functools.lru_cache(maxsize=65536, typed=True)
def _seconds(frame: int, frame_shift: float) -> float:
    return round(frame * frame_shift, 6)


def piece_peaks(inputs: SearchInput, utterances: np.ndarray, path: np.ndarray, pieces: np.ndarray,
                births: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the frame in which each piece of each hypothesis is most probable, from its birth to the next's.

    A prefix can be born frames before its last piece peaks, on a small probability that just made the beam.
    Hypotheses share most of their prefixes, and each is looked at once.

    Args:
        utterances: [n]; path, lengths: see PrefixArena.trace; pieces, births: of the path, births as real
            frames.

    Returns:
        [n, longest] int64.
    """
    if not path.size:
        return np.zeros_like(path)
    row, at = (path >= 0).nonzero()
    last = at + 1 == lengths[row]
    ends = inputs.lens.cpu().numpy()[utterances[row]]
    following = np.minimum(at + 1, path.shape[1] - 1)
    follower = path[row, following]
    starts, stops = births[row, at], np.where(last, ends, births[row, following])
    # one look for each prefix and the next; the last of a hypothesis has none next
    owner = np.zeros(int(path.max()) + 1, np.int64)
    number = np.arange(len(row))
    owner[follower[~last]] = number[~last]
    owner = np.where(last, number, owner[follower])
    chosen = (owner == number).nonzero()[0]
    frames = _peaks(inputs, utterances[row[chosen]], pieces[row, at][chosen], starts[chosen], stops[chosen])
    found = np.zeros(len(row), np.int64)
    found[chosen] = frames
    peaks = np.zeros_like(path)
    peaks[row, at] = found[owner]
    return peaks


def _peaks(inputs: SearchInput, utterances: np.ndarray, pieces: np.ndarray, starts: np.ndarray,
           stops: np.ndarray) -> np.ndarray:
    """Return the first frame [m] from ``starts`` to ``stops`` in which a piece is most probable there."""
    _, frames, size = inputs.log_probs.shape
    counts = stops - starts
    first = counts.cumsum() - counts
    time = np.arange(counts.sum()) + np.repeat(starts - first, counts)
    index = np.repeat(utterances * frames * size + pieces, counts) + time * size
    values = inputs.log_probs.take(torch.from_numpy(index).to(inputs.log_probs.device)).cpu().numpy()
    best = np.repeat(np.maximum.reduceat(values, first), counts)
    return np.minimum.reduceat(np.where(values == best, time, frames), first)
