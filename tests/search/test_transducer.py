"""The transducer search against its slow twins and torchaudio's loss, its invariances, its errors.
Knows: the transducer search, tokens. Must not know: large language models.
"""
from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.transducer import all_alignments, alsd, dictionary_search, modified_beam_search
from search_tools import TOKENS, assert_near, assert_same
from transducer_tools import (
    TinyTransducer,
    each_engine,  # noqa: F401 (a fixture of all tests here)
    encodings,
    listing,
    search,
)

from icefall_fusion.fusion.internal_lm import InternalLmFusion
from icefall_fusion.search import PrefixSearchOptions
from icefall_fusion.search.engines.transducer import TransducerEngine, open_transducer
from icefall_fusion.search.fusion import FusionSet
from icefall_fusion.text.tokens import AcousticTokens

TOKENS_20 = AcousticTokens.from_pieces(["<blk>", *(f"▁{chr(97 + n)}" for n in range(19))], 0)

# -- exactness


@pytest.mark.parametrize(("frames", "pieces", "symbols"),
                         [(1, 2, 1), (4, 3, 1), (5, 3, 1), (1, 3, 2), (3, 3, 2), (2, 3, 4)])
@pytest.mark.parametrize("blank", [0, 1])
def test_nothing_pruned_equals_brute_force_over_all_alignments(frames, pieces, symbols, blank):
    model = TinyTransducer(pieces, seed=frames, blank_id=blank)
    encoder = encodings(7, 2, frames)
    for rows, nbest in zip(encoder, search(model, encoder, beam=600, symbols=symbols)):
        expected = all_alignments(model.rows(rows), frames, blank, symbols, pieces)
        assert dict(listing(nbest)) == pytest.approx(expected, abs=1e-4)
        assert_same(listing(nbest)[:5], sorted(expected.items(), key=lambda found: -found[1])[:5])


def test_scores_of_all_prefixes_sum_to_one_where_a_frame_has_one_symbol():
    nbest = search(TinyTransducer(3), encodings(1, 1, 6), beam=800)[0]
    assert sum(math.exp(h.scores["rnnt"]) for h in nbest) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_a_beam_that_keeps_everything_finds_the_loss_of_torchaudio(seed):
    loss = pytest.importorskip("torchaudio").functional.rnnt_loss
    model, encoder, frames = TinyTransducer(3, seed=seed), encodings(seed, 1, 3), 3
    found = dict(listing(search(model, encoder, beam=1100, symbols=3)[0]))
    assert len(found) == 2**10 - 1
    for tokens, score in found.items():
        if not 0 < len(tokens) <= 3:  # a longer one may have more in a frame; none has no targets
            continue
        contexts = torch.tensor([*model.start, *tokens]).unfold(0, 2, 1)  # [U + 1, 2]
        states = model.predict(contexts).repeat(frames, 1)
        grid = model.join(encoder[0].repeat_interleave(len(contexts), 0), states)
        lengths = torch.tensor([frames], dtype=torch.int32), torch.tensor([len(tokens)], dtype=torch.int32)
        targets = torch.tensor([tokens], dtype=torch.int32)
        exact = -loss(grid.view(1, frames, -1, 3), targets, *lengths, blank=0, fused_log_softmax=False)
        assert score == pytest.approx(float(exact), abs=1e-4)


@pytest.mark.parametrize("blank", [0, 2])
def test_a_beam_that_keeps_everything_finds_what_alsd_finds(blank):
    """By frames or by the length of the alignment: all ways to a text are summed."""
    model, encoder, frames = TinyTransducer(3, seed=4, blank_id=blank), encodings(4, 1, 3), 3
    found = dict(listing(search(model, encoder, beam=1100, symbols=3)[0]))
    expected = alsd(model.rows(encoder[0]), frames, blank, 10_000, 3)
    assert len(expected) == 1 + 2 + 4 + 8  # no more than three pieces, so three in a frame are all
    assert {text: found[text] for text, _ in expected} == pytest.approx(dict(expected), abs=1e-4)


def test_a_pruned_search_finds_the_best_text_of_alsd_or_a_better_one():
    """ALSD compares hypotheses of other frames, so it loses more where one frame says much."""
    same, pieces = 0, 0
    for seed in range(12):
        model = TinyTransducer(12, seed=seed, sharpness=2.0, blank_bias=6.0)
        encoder = encodings(seed, 1, 12)
        best, score = alsd(model.rows(encoder[0]), 12, 0, 30, 30)[0]
        ours, mass = listing(search(model, encoder, beam=30, symbols=6)[0])[0]
        same, pieces = same + (ours == best), pieces + len(best)
        assert mass > score - 0.05 and (ours != best or mass < score + 0.05)
    assert same >= 7 and pieces > 60


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), frames=st.integers(0, 20), pieces=st.integers(2, 20),
       beam=st.integers(1, 8), symbols=st.integers(1, 3), context=st.integers(1, 3),
       sharpness=st.sampled_from([0.5, 1.0, 3.0]), data=st.data())
def test_pruned_search_equals_dictionary_search(seed, frames, pieces, beam, symbols, context, sharpness,
                                                data):
    model = TinyTransducer(pieces, context, seed=seed, sharpness=sharpness, blank_bias=2.0)
    lens, encoder = torch.tensor([frames, data.draw(st.integers(0, frames))]), encodings(seed, 2, frames)
    found = search(model, encoder, lens, beam=beam, symbols=symbols)
    for rows, length, nbest in zip(encoder, lens.tolist(), found):
        expected = dictionary_search(model.rows(rows), length, 0, beam, symbols)
        if symbols == 1:
            assert_near(listing(nbest), expected)
        else:  # pieces that a frame emits in another order may have the same mass
            assert [score for _, score in listing(nbest)] == pytest.approx(
                [score for _, score in expected], abs=1e-3)


def test_one_symbol_a_frame_has_the_best_hypothesis_of_icefalls_modified_beam_search():
    """Icefall prunes before it merges, we after; where the model is clear the best hypothesis is the same."""
    same, gain, pieces = 0, 0.0, 0
    for seed in range(20):
        model = TinyTransducer(30, seed=seed, sharpness=3.0, blank_bias=1.0)
        encoder = encodings(seed, 1, 30)
        best, score = modified_beam_search(model.rows(encoder[0]), 30, 0, 8)[0]
        ours, ours_score = listing(search(model, encoder, beam=8)[0])[0]
        same, gain, pieces = same + (ours == best), gain + ours_score - score, pieces + len(best)
    assert same >= 19 and pieces > 150
    assert gain > 0  # what is merged first is not lost to pruning


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), frames=st.integers(1, 5))
def test_nothing_pruned_equals_icefalls_modified_beam_search(seed, frames):
    model, encoder = TinyTransducer(3, seed=seed), encodings(seed, 1, frames)
    expected = modified_beam_search(model.rows(encoder[0]), frames, 0, 400)
    assert dict(listing(search(model, encoder, beam=400)[0])) == pytest.approx(dict(expected), abs=1e-4)


def test_impossible_pieces_are_legal():
    model = TinyTransducer(5)
    model.joiner.output_linear.bias.data[3] = -math.inf
    for symbols in (1, 2):
        for nbest in search(model, encodings(3, 2, 9), beam=4, symbols=symbols):
            assert all(3 not in h.tokens and math.isfinite(h.scores["rnnt"]) for h in nbest)
            assert len({tuple(h.tokens) for h in nbest}) == len(nbest) == 4


def test_long_audio_keeps_its_precision():
    model, encoder = TinyTransducer(5, sharpness=0.5), encodings(3, 1, 800)
    expected = dictionary_search(model.rows(encoder[0]), 800, 0, 3, 1)
    assert search(model, encoder, beam=3)[0][0].scores["rnnt"] == pytest.approx(expected[0][1], rel=1e-5)


# -- invariances


@pytest.mark.parametrize("options", [{}, {"symbols": 3}, {"score_beam": 4.0}])
def test_result_depends_neither_on_batch_nor_on_padding(options):
    lens = torch.tensor([50, 23, 0, 1, 37])
    model, encoder = TinyTransducer(20, sharpness=1.5, blank_bias=2.0), encodings(7, 5, 50)
    whole = search(model, encoder, lens, beam=6, **options)
    for junk in (0.0, math.nan, math.inf, 70.0):
        padded = torch.cat([encoder, encoder[:, :20]], dim=1)
        for row, length in zip(padded, lens.tolist()):
            row[length:] = junk
        again = search(model, padded, lens, beam=6, **options)
        assert [n.hypotheses for n in again] == [n.hypotheses for n in whole]
    for b, length in enumerate(lens.tolist()):
        alone = search(model, encoder[b : b + 1, :length], lens[b : b + 1], beam=6, **options)[0]
        assert_same(listing(alone), listing(whole[b]))


def test_the_joiner_is_called_once_a_step_and_the_predictor_once_a_context():
    model, encoder = TinyTransducer(20, blank_bias=2.0), encodings(8, 3, 30)
    search(model, encoder, beam=5)
    assert len(model.joined) == 30
    assert model.joined[0] == 3 and model.joined[-1] == 15
    assert len(set(model.asked)) == len(model.asked) > 30


def test_the_predictors_outputs_are_kept_until_it_is_trained_on():
    model, encoder = TinyTransducer(20, blank_bias=2.0), encodings(8, 3, 30)
    first = search(model, encoder, beam=5)
    asked = len(model.asked)
    assert search(model, encoder, beam=5) == first
    assert len(model.asked) <= asked + 8  # some, to see whether it is still the same model
    model.predictor.embedding.weight.data.mul_(-1)
    changed = search(model, encoder, beam=5)
    fresh = TinyTransducer(20, blank_bias=2.0)
    fresh.predictor.embedding.weight.data.mul_(-1)
    assert changed == search(fresh, encoder, beam=5) != first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("symbols", [1, 3])
def test_a_gpu_finds_what_a_cpu_finds(symbols):
    """It has never run on a GPU."""
    model, encoder = TinyTransducer(20, sharpness=2.0, blank_bias=2.0), encodings(9, 4, 40)
    lens = torch.tensor([40, 31, 0, 17])
    expected = search(model, encoder, lens, TOKENS_20, beam=5, symbols=symbols, engine="torch")
    found = search(model.cuda(), encoder.cuda(), lens, TOKENS_20, beam=5, symbols=symbols)
    for one, other in zip(found, expected):
        assert_near(listing(one), listing(other), 1e-2)


def test_score_beam_only_drops_hypotheses():
    model, encoder = TinyTransducer(8, sharpness=2.0), encodings(10, 3, 30)
    for wide, narrow in zip(search(model, encoder, beam=8), search(model, encoder, beam=8, score_beam=3.0)):
        assert narrow[0].tokens == wide[0].tokens
        assert all(h.total > narrow[0].total - 3.5 for h in narrow) and len(narrow) <= len(wide)


@pytest.mark.parametrize("symbols", [1, 2, 3])
def test_score_beam_prunes_where_the_slow_twin_does(symbols):
    """After each step, and once more when all have ended the frame."""
    for seed in range(10):
        model, encoder = TinyTransducer(8, seed=seed, sharpness=2.0), encodings(seed, 1, 12)
        expected = dictionary_search(model.rows(encoder[0]), 12, 0, 8, symbols, score_beam=1.5)
        nbest = search(model, encoder, beam=8, symbols=symbols, score_beam=1.5)[0]
        found = [score for _, score in listing(nbest)]
        assert found == pytest.approx([score for _, score in expected], abs=1e-3)


def test_text_and_word_times_tell_the_frame_of_emission():
    """The joiner's own output decides: a frame of the encoder asks for one piece strongly."""
    model = TinyTransducer(6, width=8, sharpness=0.0)
    model.joiner.output_linear.weight.data = 40 * torch.eye(6, 8)
    model.joiner.output_linear.bias.data.zero_()
    model.joiner.decoder_proj.weight.data.zero_()
    model.joiner.decoder_proj.bias.data.zero_()
    best = torch.tensor([0, 1, 2, 0, 3, 3, 0, 4])
    encoder = torch.nn.functional.one_hot(best, 8).float().unsqueeze(0)
    hypothesis = search(model, encoder, tokens=TOKENS, nbest=3)[0][0]
    assert hypothesis.text == "ab c cd" and hypothesis.scores["words"] == 3
    assert [(t.word, t.start) for t in hypothesis.times] == [("ab", 0.04), ("c", 0.16), ("cd", 0.2)]
    assert hypothesis.total == hypothesis.scores["rnnt"]
    assert len(search(model, encoder, tokens=TOKENS, nbest=3)[0]) == 3


def test_empty_utterances():
    model = TinyTransducer(6)
    nbests = search(model, encodings(12, 2, 1), torch.tensor([0, 1]), TOKENS, ids=["none", "one"])
    assert nbests[0].utterance == "none" and len(nbests[0]) == 1
    assert nbests[0][0].tokens == [] and nbests[0][0].scores["rnnt"] == 0.0
    assert search(model, torch.zeros(0, 0, 8), torch.zeros(0, dtype=torch.int64)) == []
    assert len(search(model, torch.zeros(1, 0, 8))[0]) == 1


# -- errors


def test_bad_arguments_are_named():
    model, encoder = TinyTransducer(6), encodings(1, 2, 5)
    with pytest.raises(ValueError, match=r"encoder must have 3 dimensions \[B, T, J\]"):
        search(model, encoder[0], torch.tensor([5]))
    with pytest.raises(ValueError, match="lens of utterance 1 must be in 0..5"):
        search(model, encoder, torch.tensor([5, 6]))
    with pytest.raises(ValueError, match="tokens.size must equal the 7 pieces of the model"):
        search(TinyTransducer(7), encoder, tokens=TOKENS)
    with pytest.raises(ValueError, match="tokens.blank_id must be the blank of the model"):
        search(TinyTransducer(6, blank_id=3), encoder, tokens=TOKENS)
    with pytest.raises(ValueError, match="model must have start, .*without"):
        search(torch.nn.Linear(2, 2), encoder)
    encoder[1, 3, 2] = math.nan
    with pytest.raises(ValueError, match="encoder outputs of utterance b must be finite"):
        search(model, encoder, ids=["a", "b"])
    search(model, encoder, torch.tensor([5, 3]))


@pytest.mark.parametrize("options", [
    {"recover_mass": True}, {"blank_skip": 0.9}, {"groups": 2}, {"engine": "triton"}])
def test_options_that_do_not_serve_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be .* for transducers"):
        search(TinyTransducer(6), encodings(1, 1, 3), **options)
    with pytest.raises(ValueError, match="PrefixSearchOptions.symbols must be an integer, at least 1"):
        PrefixSearchOptions(symbols=0)


def test_an_engine_is_refused_where_it_does_not_serve():
    inputs = SimpleNamespace(log_probs=torch.zeros(1, 1, 1, device="meta"))
    with pytest.raises(ValueError, match="engine must be auto or torch: it is for cpu, .* are on meta"):
        open_transducer(inputs, None, None, PrefixSearchOptions(engine="native"), FusionSet([], None))


def test_scores_that_are_no_numbers_name_the_utterance():
    model = TinyTransducer(6)
    encoder = encodings(1, 2, 4)
    model.joiner.output_linear.bias.data[2] = math.nan
    for value in (math.nan, math.inf):
        model.joiner.output_linear.bias.data[2] = value
        with pytest.raises(ValueError, match="log-probs of utterance b must be numbers .*, or none is left"):
            search(model, encoder, torch.tensor([0, 4]), ids=["a", "b"])
    with pytest.raises(ValueError, match="log-probs and the scores of ilm of utterance b must be numbers"):
        search(model, encoder, torch.tensor([0, 4]), None, [InternalLmFusion(model, 0.0)], ids=["a", "b"])


def test_sizes_of_a_models_parts_are_compared():
    encoder = encodings(1, 2, 4)
    with pytest.raises(ValueError, match=r"encoder must have as many .* a context \(8\), but is 12"):
        search(TinyTransducer(6), encodings(1, 2, 4, width=12))
    for wrong in (lambda rows: rows[:, :5], lambda rows: rows[:1], lambda rows: rows[None]):
        model = TinyTransducer(6)
        model.join = lambda *both, wrong=wrong, join=model.join: wrong(join(*both))
        with pytest.raises(ValueError, match=r"model.join must return .* \(2, 6\), but is \("):
            search(model, encoder)


def test_padding_does_no_harm_where_all_slots_are_asked(monkeypatch):
    """As on a GPU, where the host does not know which slots are open."""
    def ask_all(self):
        self.on_host = False
        return run(self)

    run = TransducerEngine.run
    model, encoder, lens = TinyTransducer(6), encodings(1, 2, 8), torch.tensor([8, 3])
    expected = search(model, encoder, lens, engine="torch")
    monkeypatch.setattr(TransducerEngine, "run", ask_all)
    for junk in (0.0, math.nan, math.inf):
        encoder[1, 3:] = junk
        for one, other in zip(search(model, encoder, lens, engine="torch"), expected):
            assert_near(listing(one), listing(other))
