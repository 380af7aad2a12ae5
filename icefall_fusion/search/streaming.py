"""The prefix search of one stream: frames come in blocks, and what all hypotheses share is forgotten.
Knows: the compiled search, its arena and beam. Must not know: language models, audio, when to forget.

It is the search of a batch of one (engines/native.py) that is not told where the utterance ends. The result
is that of `ctc_prefix_search` over all frames at once, however they are cut into blocks. After `forget` the
hypotheses are those of the frames that are left; scores stay those of the whole.
"""
from __future__ import annotations

import ctypes
import math
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Iterator, NamedTuple, Optional, Sequence

import numpy as np
import torch

from icefall_fusion.common.checks import check
from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.search.beam import Beam
from icefall_fusion.search.engines import check_serves
from icefall_fusion.search.engines.base import plan_frames
from icefall_fusion.search.engines.native import NativeSearch
from icefall_fusion.search.export import export_nbests, piece_peaks
from icefall_fusion.search.fusion import Fusion, FusionSet
from icefall_fusion.search.search_input import PrefixSearchOptions, SearchInput, check_input

if TYPE_CHECKING:
    from torch import Tensor

    from icefall_fusion.nbest import NBest
    from icefall_fusion.text.tokens import AcousticTokens

_ROOM = 64  # frames reserved at first


class Live(NamedTuple):
    """The n live hypotheses, best first; numpy.

    slots: [n]; scores: [n] float64, relative; lengths: [n] pieces.
    path: [n, longest] arena node after each piece; pieces: [n, longest]; both -1 after the end.
    """

    slots: np.ndarray
    scores: np.ndarray
    lengths: np.ndarray
    path: np.ndarray
    pieces: np.ndarray


class StreamingSearch:
    """The search of one stream.

    Args:
        tokens: the acoustic vocabulary.
        options: of the search; engine auto or native.
        fusions: begun by nobody else.
        name: of the stream, in N-best lists and messages.

    Attributes:
        frames: frames that are held; dropped: frames before these that were forgotten.
        forgets: whether it can `forget`.

    Raises:
        ValueError: compiled code does not serve this search, or is not there.
    """

    forgets = True

    def __init__(self, tokens: AcousticTokens, options: PrefixSearchOptions, fusions: Sequence[Fusion],
                 name: str) -> None:
        self.tokens, self.options, self.name = tokens, options, name
        self.fusions = FusionSet(fusions, tokens)
        self.frames, self.dropped, self._forgotten = 0, 0, 0.0
        self._log_probs = torch.zeros(1, _ROOM, tokens.size)
        self._best, self._searched = torch.zeros(1, _ROOM), torch.zeros(1, _ROOM, dtype=torch.bool)
        inputs = self._inputs()
        starts = torch.tensor(tokens.starts_word)
        self.beam = Beam.at_root(inputs, options.beam, starts, len(self.fusions.members))
        self.fusions.begin(self.beam, inputs.ids)
        self._search = self._open(inputs)

    def _open(self, inputs: SearchInput) -> Any:
        """Return the engine."""
        options = self.options
        good = options.engine in ("auto", "native")
        check(good, "PrefixSearchOptions.engine", "be auto or native in a stream", options.engine)
        try:
            check_serves("native", options, self.fusions, torch.device("cpu"))
            plan = plan_frames(inputs, None, leave_out=False)
            search = NativeSearch(inputs, plan, self.beam, options, self.fusions)
        except Unavailable as reason:
            raise ValueError(f"a stream must be searched by compiled code: {reason}") from reason
        sources = [fusion.source for fusion in self.fusions.members]
        check(search.rule is not None, "fusions", "have one stop rule together in a stream", sources)
        search.state = search.library.prefix_search_open(ctypes.byref(search.settings))
        weakref.finalize(self, search.library.prefix_search_close, search.state)
        return search

    # --- frames ------------------------------------------------------------------------------------------

    def feed(self, log_probs: Tensor) -> None:
        """Take in the next frames: natural-log probabilities [n, V].

        Raises:
            ValueError: they are not log-probs (see `ctc_prefix_search`).
        """
        count = torch.tensor([len(log_probs)])
        new = check_input(log_probs.cpu().unsqueeze(0), count, None, self.tokens, [self.name])
        self._make_room(self.frames + len(log_probs))
        here = slice(self.frames, self.frames + len(log_probs))
        plan = plan_frames(new, self.options.blank_skip, leave_out=False)
        self._log_probs[:, here], self._best[:, here], self._searched[:, here] = plan[:3]
        self._begin_feed()
        self.frames = here.stop
        self._show()

    def advance(self) -> Iterator[None]:
        """Search all frames that are there, in steps (see ``Fusion.in_steps``)."""
        yield from self._search.run_to_stops()

    def finish(self) -> Iterator[None]:
        """Score the last words, in steps."""
        self._end()
        kept = self._best[0, : self.frames].double().sum()
        self.beam.offset += self._forgotten + kept
        yield from self.fusions.in_steps(self.beam, None)

    # --- results -----------------------------------------------------------------------------------------

    def nbest(self) -> NBest:
        """Return the N-best list after `finish`: of what was not forgotten, with the scores of the whole."""
        options = self.options
        shift = options.frame_shift if options.word_times else None
        nbest = options.nbest or options.beam
        inputs, members = self._inputs(), self.fusions.members
        return export_nbests(self.beam, inputs, None, nbest, shift, self.tokens, members)[0]

    def live(self, most: Optional[int] = None) -> Live:
        """Return the live hypotheses, the best ``most`` of them, as they are now."""
        scores = self.beam.score[0].double().numpy()
        slots = self.beam.alive[0].nonzero()[:, 0].numpy()
        slots = slots[np.argsort(-scores[slots], kind="stable")][:most]
        arena = self.beam.arena
        path, lengths = arena.trace(self.beam.node[0].numpy()[slots])
        pieces = np.where(path < 0, -1, arena.on_host("piece")[path])
        return Live(slots, scores[slots], lengths, path, pieces)

    def masses(self, live: Live) -> np.ndarray:
        """Return the natural-log probability of each hypothesis so far [n], without scores of fusions."""
        frames = self._forgotten + float(self._best[0, : self.frames].double().sum())
        totals = self.beam.log_total[0].double().numpy()[live.slots]
        return totals + float(self.beam.offset[0]) + frames

    def peaks(self, live: Live, rank: int = 0) -> np.ndarray:
        """Return the frame of each piece of a hypothesis [length], counted from the first frame of all."""
        return self.all_peaks(live, slice(rank, rank + 1))[0, : live.lengths[rank]]

    def all_peaks(self, live: Live, ranks: slice = slice(None)) -> np.ndarray:
        """Return the same of several hypotheses [n, longest]; without meaning after the end of each."""
        path, pieces = live.path[ranks], live.pieces[ranks]
        births = path // self.beam.arena.row_size - 1
        rows = np.zeros(len(path), np.int64)
        return piece_peaks(self._inputs(), rows, path, pieces, births, live.lengths[ranks]) + self.dropped

    # --- forgetting --------------------------------------------------------------------------------------

    def keep(self, slots: np.ndarray) -> None:
        """Drop all hypotheses but those in ``slots``."""
        nodes = np.full(self.beam.arena.beam, -1, np.int64)
        nodes[slots] = self.beam.node[0].numpy()[slots]
        self._renumber(0, nodes)

    def forget(self, live: Live, count: int) -> int:
        """Forget the first ``count`` pieces of all hypotheses, and frames that only these needed.

        The arena's root then stands for these pieces. Fusions that hold arena nodes must hear of it (they ask
        before and are told after; see fusion/streaming.py).

        Args:
            live: all hypotheses as they are now; they share these pieces, and go on with one that starts a
                word.

        Returns:
            frames that were dropped.
        """
        arena, size, rows = self.beam.arena, self.beam.arena.row_size, self.beam.arena.rows
        rule = self._search.stops
        step = math.lcm(max(1, rule.every), self._search.ahead.every)  # looks stay in the same frames
        shift = (int((live.path[:, count] // size).min()) - 1) // step * step
        roots = torch.from_numpy(np.unique(live.path[:, count - 1]))
        for name, field in zip(("parent", "piece", "boundary"), arena.fields):
            moved = field[shift + 1 : rows].clone()
            if name != "piece":
                root = (moved < (shift + 1) * size) | torch.isin(moved, roots)
                moved = torch.where(root, 0, moved - shift * size)
            field[1 : rows - shift] = moved
        arena.rows = rows - shift
        totals = self._search.totals
        if len(totals):
            root = float(totals.view(-1)[roots[0]])
            totals[1 : rows - shift] = totals[shift + 1 : rows].clone()
            totals[0] = root
        nodes = np.full(arena.beam, -1, np.int64)
        nodes[live.slots] = live.path[np.arange(len(live.slots)), live.lengths - 1] - shift * size
        self._drop_frames(shift)
        self._renumber(shift, nodes)
        return shift

    def _drop_frames(self, count: int) -> None:
        self._forgotten += float(self._best[0, :count].double().sum())
        left = self.frames - count
        for values in (self._log_probs, self._best, self._searched):
            values[:, :left] = values[:, count : self.frames].clone()
        self.frames, self.dropped = left, self.dropped + count
        search = self._search
        search.late_at[search.late_at >= 0] -= count
        self._show()

    def _renumber(self, frames: int, nodes: np.ndarray) -> None:
        """Give the slots their arena nodes [K]; those with -1 are dropped."""
        beam, search = self.beam, self._search
        kept = (nodes >= 0).nonzero()[0]
        source = torch.arange(len(nodes))
        source[: len(kept)] = torch.from_numpy(kept)
        fused, estimate = beam.fused[:, source], search.estimate[:, source]
        search.scored.copy_(search.scored[:, source])
        beam.permute_scores(source.unsqueeze(0))
        beam.fused = beam.fused.contiguous()
        arrays = search._batch()
        search.library.prefix_search_forget(search.state, ctypes.byref(arrays), 0, frames, nodes.ctypes.data)
        beam.fused.copy_(fused)
        search.estimate.copy_(estimate)

    # --- inside ------------------------------------------------------------------------------------------

    def _begin_feed(self) -> None:
        self._search.before = self.frames

    def _end(self) -> None:
        self._search.end()

    def _inputs(self) -> SearchInput:
        live = torch.ones(1, self.frames, dtype=torch.bool)
        log_probs, best = self._log_probs[:, : self.frames], self._best[:, : self.frames]
        lens = torch.tensor([self.frames])
        return SearchInput(log_probs, best, live, lens, [self.name], self.tokens.blank_id)

    def _show(self) -> None:
        """Let the engine see the frames that are held."""
        search, held = self._search, slice(0, self.frames)
        search.log_probs, search.best = self._log_probs[:, held], self._best[:, held]
        search.searched = self._searched[:, held]
        search.live = torch.ones(1, self.frames, dtype=torch.bool)
        search.frames = self.frames
        self.beam.lens.fill_(self.frames)
        search.set_lens(self.beam.lens)

    def _make_room(self, frames: int) -> None:
        while frames > self._log_probs.shape[1]:
            for name in ("_log_probs", "_best", "_searched"):
                values = getattr(self, name)
                setattr(self, name, torch.cat([values, torch.zeros_like(values)], 1))
        while frames + 1 > self.beam.arena.fields[0].shape[0]:
            self.beam.arena.grow()


def check_stream_options(options: PrefixSearchOptions, frame_shift: float) -> PrefixSearchOptions:
    """Return the options of a stream's search with the frame shift of its model."""
    good = isinstance(options, PrefixSearchOptions)
    check(good, "search", "be PrefixSearchOptions", type(options).__name__)
    return replace(options, frame_shift=frame_shift)
