"""What speaks for and against each word of a hypothesis: the N-best list, the acoustic model, the LLM.
Knows: N-best lists, log-probs, language models. Must not know: how it is made a probability.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import numpy as np
import torch

from icefall_fusion.common.checks import check
from icefall_fusion.fusion.word_scores import score_words
from icefall_fusion.nbest import NBest
from icefall_fusion.scoring.wer import correct_words
from icefall_fusion.text.tokens import AcousticTokens

if TYPE_CHECKING:
    from icefall_fusion.lm import CausalLm

#: What is measured of a word; natural logarithms. The last two need a language model.
ACOUSTIC = ("list", "piece_mean", "piece_least", "letters", "against", "frames", "utterance")
NAMES = (*ACOUSTIC, "llm", "llm_next")
_LEAST = 1e-3  # posteriors of a list lie between this and 1 less this


def word_evidence(nbest: NBest, log_probs: torch.Tensor, tokens: AcousticTokens,
                  lm: Optional[CausalLm] = None, style: str = "as-is", prompt: str = "") -> np.ndarray:
    """Return what is known of each word of the best hypothesis: [words, names].

    list: log odds of its posterior in the N-best list, all scores in. piece_mean, piece_least: log-probs of
    its pieces where they are marked. letters: log of their number. against: log(1 + what the best path of the
    frames around the word has more than its own). frames, utterance: mean log-prob of the best piece there.
    llm, llm_next: log-prob of the word and of the next one (columns that are there with a language model).

    Args:
        nbest: of one utterance, with its tokens.
        log_probs: [T, V] of the utterance.
        tokens: V pieces.
        lm, style, prompt: the language model, how it sees words, and the earlier text.
    """
    best = nbest[0]
    words, spans = best.words(), tokens.word_spans(best.tokens)
    rule = "have pieces for each word"
    check(len(words) == len(spans), f"the hypothesis of {nbest.utterance}", rule, best.text)
    size = len(NAMES if lm is not None else ACOUSTIC)
    if not words:
        return np.zeros((0, size))
    columns = [_list_odds(nbest), *_acoustic(log_probs.float().cpu(), best.tokens, spans, tokens.blank_id)]
    columns.insert(3, np.log([len(word) for word in words]))
    if lm is not None:
        scored = score_words(lm, [words], style, prompt)[0]
        llm = np.array([sum(token.log_prob for token in word) for word in scored])
        columns += [llm, np.append(llm[1:], 0.0)]
    return np.stack(columns, 1)


def _list_odds(nbest: NBest) -> np.ndarray:
    """Return the log odds of each word of the best hypothesis by the weighted scores of the list."""
    words = nbest[0].words()
    totals = np.array([hypothesis.total for hypothesis in nbest])
    share = np.exp(totals - totals.max())
    share, mass = share / share.sum(), np.zeros(len(words))
    for hypothesis, posterior in zip(nbest, share):
        mass[correct_words(words, hypothesis.words())] += posterior
    mass = mass.clip(_LEAST, 1 - _LEAST)
    return np.log(mass / (1 - mass))


def _acoustic(log_probs: torch.Tensor, pieces: list[int], spans: list[tuple[int, int]],
              blank: int) -> tuple[np.ndarray, ...]:
    """Return piece_mean, piece_least, against, frames, utterance of each word, by a forced alignment."""
    path = _align(log_probs, pieces, blank)
    values, best = log_probs.numpy(), log_probs.amax(1).numpy()
    change = np.append(True, path[1:] != path[:-1]) & (path != blank)
    number = change.cumsum() - 1  # of the piece that the frame's is, or follows
    own = values[np.arange(len(path)), path]
    peaks = np.full(len(pieces), -np.inf)
    np.maximum.at(peaks, number[path != blank], own[path != blank])
    first = np.flatnonzero(change)
    last = np.append([np.flatnonzero((number == k) & (path != blank))[-1] for k in range(len(pieces))],
                     len(path))
    rows = []
    for start, stop in spans:
        begin = last[start - 1] + 1 if start else 0
        end = first[stop] if stop < len(pieces) else len(path)
        around, marks = slice(begin, end), peaks[start:stop].clip(-50)
        lost = float((best[around] - own[around]).clip(0, 50).sum())
        rows.append((marks.mean(), marks.min(), np.log1p(lost), best[around].mean(), best.mean()))
    return tuple(np.array(column) for column in zip(*rows))


def _align(log_probs: torch.Tensor, pieces: list[int], blank: int) -> np.ndarray:
    """Return the piece of each frame [T] on the best path that says ``pieces`` (Viterbi, by torchaudio)."""
    from torchaudio.functional import forced_align

    targets = torch.tensor([pieces])
    return forced_align(log_probs.clamp(-1e4)[None].contiguous(), targets, blank=blank)[0][0].numpy()
