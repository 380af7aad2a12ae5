"""The weight of hot words: found on dev, recall of the listed phrases against the word errors of all else.
Knows: counts of phrases at some weights. Must not know: how dev is decoded, test sets.
"""
from __future__ import annotations

import logging
from typing import Callable, Mapping

from icefall_fusion.common.checks import check
from icefall_fusion.scoring.phrases import PhraseScores

#: Factors of the boosts that are tried; then around the best.
GRID = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)


def choose_weight(score: Callable[[float], PhraseScores], harm: float) -> tuple[float, dict[str, float]]:
    """Return the weight of hot words with the best recall, and what it costs.

    Of all weights tried those count under which the WER of all else is at most ``harm`` points above that
    without hot words. Of equals the smallest wins: dev has few names.

    Args:
        score: decodes dev with hot words of this weight.
        harm: in percentage points, at least 0.

    Raises:
        ValueError: no listed phrase is in the references.
    """
    bare = score(0.0)
    check(bare.spoken > 0, "hot words", "be in the references of dev", 0)
    found: dict[float, PhraseScores] = {0.0: bare}

    def harmless(weight: float) -> bool:
        if weight not in found:
            found[weight] = score(weight)
            logging.info("hot words * %g: recall %.1f %%, WER of all else %.2f %%, %d false", weight,
                         found[weight].recall, found[weight].wer_else, found[weight].false)
        return found[weight].wer_else <= bare.wer_else + harm

    over = 0
    for weight in GRID:
        over = 0 if harmless(weight) else over + 1
        if over == 2:
            break
    best = _best(found, harmless)
    larger = [weight for weight in GRID if weight > best]
    if best and larger and not harmless(larger[0]):  # the edge lies between
        harmless(round((best + larger[0]) / 2, 4))
        best = _best(found, harmless)
    return best, {"recall": round(found[best].recall, 2), "recall_without": round(bare.recall, 2),
                  "wer_else": round(found[best].wer_else, 3), "wer_else_without": round(bare.wer_else, 3),
                  "spoken": bare.spoken, "false": found[best].false, "false_without": bare.false}


def _best(found: Mapping[float, PhraseScores], harmless: Callable[[float], bool]) -> float:
    return max(filter(harmless, list(found)), key=lambda weight: (found[weight].found, -weight))
