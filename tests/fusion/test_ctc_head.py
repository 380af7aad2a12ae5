"""CTC joined with a transducer: against all alignments walked by hand, the CTC loss of torch, and itself.
Knows: the transducer search, random log-probs of a CTC head. Must not know: trained models.
"""
from __future__ import annotations

import functools
import math

import pytest
import torch
from torch.nn import functional as F

from icefall_fusion.fusion import CtcHeadFusion, DelayedFusion, HotWordFusion
from icefall_fusion.fusion.ctc_head import GAIN, LEAST_PIECE, LEAST_TEXT
from icefall_fusion.text.tokens import AcousticTokens
from tests.fusion.test_fusion import (
    PIECES,
    assert_same,
    llm,  # noqa: F401 (a fixture)
    tokens,  # noqa: F401 (a fixture)
)
from tests.reference.ctc_head import SlowCtcHead
from tests.reference.fused_search import SlowFusion, fused_search
from tests.transducer_tools import TinyTransducer, encodings, search

FOUR = AcousticTokens.from_pieces(["<blk>", "\u2581a", "b", "\u2581c"], 0)


def ctc(seed, batch, frames, pieces, sharpness=2.0):
    """Log-probs of a CTC head."""
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(batch, frames, pieces, generator=generator)).log_softmax(2)


@pytest.mark.parametrize(("frames", "weight"), [(1, 0.4), (2, 1.0), (5, 0.4), (5, 1.0)])
@pytest.mark.parametrize("beam", [3, 40])
@pytest.mark.parametrize("slack", [0, 2, 9])
def test_a_joint_search_is_its_slow_twin_over_all_alignments(frames, weight, beam, slack):
    model, encoder, log_probs = TinyTransducer(4, seed=frames), encodings(3, 3, frames), ctc(5, 3, frames, 4)
    log_probs[1, 0, 2] = -math.inf
    log_probs = log_probs.log_softmax(2)
    lens = torch.tensor([frames, frames, max(1, frames - 1)])
    fusion = CtcHeadFusion(log_probs, lens, weight, slack=slack)
    nbests = search(model, encoder, lens, FOUR, [fusion], beam=beam)
    for nbest, one, row, length in zip(nbests, encoder, log_probs, lens.tolist()):
        slow = SlowCtcHead(row[:length].clamp(min=LEAST_PIECE).tolist(), 0, LEAST_TEXT, slack)
        twin = SlowFusion("ctc_head", weight, 0.0, lambda prefix, words, slow=slow: slow.whole(prefix),
                          prefix_score=slow.begins, gain=GAIN, frame_score=slow.after_frame)
        rows = [functools.partial(model.rows(one), frame) for frame in range(length)]
        expected = fused_search(rows, beam, FOUR, [twin], "rnnt")
        found = [(tuple(h.tokens), h.scores["ctc_head"], h.total) for h in nbest]
        for (pieces, score, total), (prefix, scores) in zip(found, expected):
            assert pieces == prefix or total == pytest.approx(scores["total"], abs=1e-3)
            assert total == pytest.approx(scores["total"], abs=1e-3)
            assert score == pytest.approx(slow.whole(pieces), abs=1e-3)
        assert len(found) == min(beam, len(expected))


@pytest.mark.parametrize("symbols", [1, 2])
def test_a_large_weight_ranks_as_ctc_does(symbols):
    """All texts are kept; those that CTC cannot align come last."""
    model, encoder, log_probs = TinyTransducer(3, seed=1), encodings(3, 1, 4), ctc(7, 1, 4, 3)
    lens = torch.tensor([4])
    nbest = search(model, encoder, lens, fusions=[CtcHeadFusion(log_probs, lens, 1000.0)], beam=600,
                   symbols=symbols)[0]
    texts = SlowCtcHead(log_probs[0].tolist(), 0, LEAST_TEXT).texts
    best = sorted(texts, key=texts.get, reverse=True)
    assert [tuple(h.tokens) for h in nbest][: len(best)] == best and len(best) > 8


@pytest.mark.parametrize("symbols", [1, 3])
def test_scores_are_minus_the_ctc_loss(symbols):
    model = TinyTransducer(6, seed=3, sharpness=1.5, blank_bias=1.0)
    encoder, log_probs, lens = encodings(4, 3, 40), ctc(4, 3, 40, 6), torch.tensor([40, 23, 31])
    repeats = 0
    for row, nbest in enumerate(search(model, encoder, lens, beam=6, symbols=symbols,
                                       fusions=[CtcHeadFusion(log_probs.half(), lens, 0.3)])):
        for h in nbest:
            loss = F.ctc_loss(log_probs.half().double()[row, : lens[row], None], torch.tensor([h.tokens]),
                              lens[row : row + 1], torch.tensor([len(h.tokens)]), reduction="sum")
            assert h.scores["ctc_head"] == pytest.approx(max(-float(loss), LEAST_TEXT), rel=1e-4)
            repeats += sum(a == b for a, b in zip(h.tokens, h.tokens[1:]))
    assert repeats > 0


@pytest.mark.parametrize("symbols", [1, 3])
def test_weight_zero_is_no_ctc(symbols):
    model, encoder, lens = TinyTransducer(6, blank_bias=1.0), encodings(4, 3, 30), torch.tensor([30, 0, 17])
    options = {"beam": 5, "symbols": symbols, "engine": "torch"}
    bare = search(model, encoder, lens, **options)
    fused = search(model, encoder, lens, fusions=[CtcHeadFusion(ctc(1, 3, 30, 6), lens, 0.0)], **options)
    for one, other in zip(bare, fused):
        assert [(h.tokens, h.total) for h in one] == [(h.tokens, h.total) for h in other]


@pytest.mark.parametrize("symbols", [1, 2])
def test_a_batch_is_its_utterances_one_by_one(llm, tokens, symbols):  # noqa: F811
    model = TinyTransducer(len(PIECES), width=16, sharpness=1.5, blank_bias=1.0)
    model.joiner.output_linear.bias.data[1:3] -= 9.0  # marks and unknown pieces are rare
    encoder, lens = encodings(5, 4, 25, 16), torch.tensor([25, 0, 11, 19])
    log_probs = ctc(6, 4, 30, len(PIECES))
    log_probs[2, 11:] = math.nan  # padding means nothing

    def decode(rows):
        fusions = [CtcHeadFusion(log_probs[rows], lens[rows], 0.4, word_bonus=0.3), DelayedFusion(llm, 0.4),
                   HotWordFusion([("a sea", 3.0)], 1.0)]
        return search(model, encoder[rows], lens[rows], tokens, fusions, beam=4, symbols=symbols)

    assert_same(decode(list(range(4))), [decode([row])[0] for row in range(4)], 1e-3)


def test_who_says_nothing_pays():
    """CTC is sure of a piece in frame 2, the transducer of blanks: a prefix score alone comes too late."""
    model, frames = TinyTransducer(3, sharpness=0.0), 8
    model.joiner.output_linear.bias.data = torch.tensor([4.0, 0.0, 0.0])
    log_probs = torch.full((1, frames, 3), -9.0)
    log_probs[:, :, 0] = 0.0
    log_probs[:, 2] = torch.tensor([-9.0, 0.0, -9.0])
    log_probs, lens = log_probs.log_softmax(2), torch.tensor([frames])

    def best(slack):
        fusion = CtcHeadFusion(log_probs, lens, 1.0, slack=slack)
        return search(model, encodings(1, 1, frames), lens, fusions=[fusion], beam=1)[0][0]

    assert best(1).tokens == [1] and best(100).tokens == []
    assert best(1).total > best(100).total + 3


def test_what_is_of_another_batch_is_refused():
    model, encoder, lens = TinyTransducer(4), encodings(1, 2, 5), torch.tensor([5, 3])

    def decode(log_probs, lens_of_ctc=lens):
        fusion = CtcHeadFusion(log_probs, lens_of_ctc, 0.5)
        return search(model, encoder, lens, FOUR, [fusion], ids=["a", "b"])

    with pytest.raises(ValueError, match="CtcHeadFusion.log_probs must be set"):
        decode(None)
    with pytest.raises(ValueError, match=r"CtcHeadFusion.lens must be those of the search \(\[5, 3\]\)"):
        decode(ctc(1, 2, 5, 4), torch.tensor([5, 4]))
    for shape in ((1, 5, 4), (2, 4, 4), (2, 5, 5)):
        with pytest.raises(ValueError, match=r"log_probs must be of shape \[2, 5 or more, 4\], but is \("):
            decode(ctc(1, *shape))
    broken = ctc(1, 2, 5, 4)
    broken[1, 2, 1] = math.nan
    with pytest.raises(ValueError, match="CTC log-probs of utterance b must be numbers"):
        decode(broken)
    with pytest.raises(ValueError, match="weight must be finite and at least 0"):
        CtcHeadFusion(None, None, -1.0)
    with pytest.raises(ValueError, match="CtcHeadFusion.slack must be an integer, at least 0 frames"):
        CtcHeadFusion(None, None, 1.0, slack=-1)
