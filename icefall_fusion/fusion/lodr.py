"""Low-order density ratio (LODR): the acoustic model's own language model is taken out again.
Knows: piece n-grams, shallow fusion of one. Must not know: how it was estimated, LLMs.

An acoustic model has learnt which pieces follow which. Beside a language model these are counted twice. LODR
(Zheng et al. 2022, arXiv 2203.16776) approximates what the acoustic model knows by an n-gram of low order
and subtracts it: ``total = ctc + weight_llm * log P_llm - weight * log P_ngram``.
"""
from __future__ import annotations

import weakref
from typing import MutableMapping

from icefall_fusion.fusion.ngram import NgramFusion
from icefall_fusion.ngram.piece_ngram import NgramOrder, PieceNgram

_IMPOSSIBLE = -100.0  # nats: files write 0 as 10^-99
_MADE: MutableMapping[PieceNgram, PieceNgram] = weakref.WeakKeyDictionary()


class LodrFusion(NgramFusion):
    """An n-gram over the acoustic pieces is subtracted, at every extension.

    Its raw score is ``-log P(pieces)``, so that weights are at least 0 as all others.

    Args:
        lm: the n-gram, of order 2 or so, e.g. of the job ``internal-lm``.
        weight: factor of its natural-log score, at least 0; 0 leaves the search as it is, bit for bit.
        word_bonus: added per word, in nats.
        eos: whether the end of the utterance is scored too.
        source: name of the score in N-best lists.

    Raises:
        ValueError: a bad weight, bonus or source (see `LmFusion`).
    """

    def __init__(
        self, lm: PieceNgram, weight: float, word_bonus: float = 0.0, eos: bool = True, source: str = "lodr"
    ) -> None:
        super().__init__(subtracted(lm), weight, word_bonus, eos, source)
        orders = self.piece_ngram.orders
        backoffs = sum(max(0.0, float(order.backoffs.max())) for order in orders[:-1])
        self.ceiling = max(float(order.log_probs.max()) for order in orders) + backoffs


def subtracted(ngram: PieceNgram) -> PieceNgram:
    """Return an n-gram whose scores are ``-log P``, made once.

    A piece that the n-gram has never seen is taken as its rarest one: none is paid for being impossible.
    """
    if ngram not in _MADE:
        unigrams = ngram.orders[0].log_probs
        least = float(unigrams[unigrams > _IMPOSSIBLE].min()) if bool((unigrams > _IMPOSSIBLE).any()) else 0.0
        orders = [
            NgramOrder(order.length, order.keys, -order.log_probs.clamp(min=least), -order.backoffs)
            for order in ngram.orders
        ]
        _MADE[ngram] = PieceNgram(ngram.size, orders, f"{ngram.name}, subtracted")
    return _MADE[ngram]
