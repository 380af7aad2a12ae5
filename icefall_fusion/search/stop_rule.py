"""The pace of a fusion: when an utterance stops to be scored, and how it is ranked meanwhile.
Knows: frames, lengths of hypotheses, an n-gram for look-ahead. Must not know: language models, who searches.

The condition is each utterance's own, so a search that knows it need not ask after every frame, nor keep its
utterances in step: each runs on to its own next event, and those that wait are then scored in one call.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Optional

if TYPE_CHECKING:
    from icefall_fusion.ngram.piece_ngram import PieceNgram

UNITS = (None, "words", "pieces")


class Ahead(NamedTuple):
    """Look-ahead: what ranks the part of a hypothesis that is not scored yet (see fusion/look_ahead.py).

    ngram: over the acoustic pieces; weight: of its natural-log score; bonus: for a word that has begun;
    every: new pieces count only after every so many frames.
    """

    ngram: PieceNgram
    weight: float
    bonus: float
    every: int


class Pace(NamedTuple):
    """When an utterance stops for a fusion, a value without state.

    every: look after every so many frames; 0: never, it runs on to its end.
    unit: None: each look stops it; ``words`` or ``pieces``: if its shortest live hypothesis has begun more of
        them than at the last stop (at first: than one word, no piece).
    ahead: the look-ahead, if there is one.
    """

    every: int
    unit: Optional[str] = None
    ahead: Optional[Ahead] = None
