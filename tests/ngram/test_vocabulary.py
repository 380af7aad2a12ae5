"""A list of words as an automaton: costs of other words, in both engines and piece by piece; forbidden words.
Knows: small vocabularies, random log-probs. Must not know: n-grams, language models.
"""
from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icefall_fusion.fusion.word_ngram import VocabularyFusion, join_oov, word_automaton
from icefall_fusion.nbest import Hypothesis, NBest
from icefall_fusion.ngram.phrases import PhraseTensors
from icefall_fusion.ngram.vocabulary import FORBIDDEN, WordAutomaton
from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search
from icefall_fusion.text.tokens import AcousticTokens

BPE = AcousticTokens.from_pieces(["<blk>", "▁a", "▁ab", "b", "▁", "a", "ba", "<unk>"], 0)
LETTERS = AcousticTokens.from_pieces(["-", "|", "a", "b", "c"], 0, delimiter="|")
WORDS = ["ab", "abba", "a", "ba", "cab"]


def emissions(seed: int, tokens: AcousticTokens, batch: int = 3, frames: int = 14):
    generator = torch.Generator().manual_seed(seed)
    log_probs = (2 * torch.randn(batch, frames, tokens.size, generator=generator)).log_softmax(-1)
    return log_probs, torch.tensor([frames, frames - 3, 1])[:batch]


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("tokens", [BPE, LETTERS], ids=["bpe", "letters"])
@pytest.mark.parametrize("oov", [-3.5, 0.0])
def test_each_word_outside_the_list_costs_its_score_once(tokens, engine, oov) -> None:
    log_probs, lens = emissions(1, tokens)
    options = PrefixSearchOptions(beam=8, engine=engine)
    nbests = ctc_prefix_search(log_probs, lens, options, tokens, [VocabularyFusion(WORDS, tokens, oov, 0.8)])
    strange = 0
    for hypothesis in (h for nbest in nbests for h in nbest if tokens.unk_id not in h.tokens):
        count = sum(word not in WORDS for word in hypothesis.words())
        assert hypothesis.scores["oov"] == pytest.approx(oov * count, abs=1e-3)
        assert hypothesis.total == pytest.approx(hypothesis.scores["ctc"] + 0.8 * oov * count, abs=1e-3)
        strange += count
    assert strange > 0


@pytest.mark.parametrize("tokens", [BPE, LETTERS], ids=["bpe", "letters"])
def test_forbidden_words_leave_the_best_of_all_texts_with_known_words(tokens) -> None:
    log_probs, _ = emissions(2, tokens, 1, 4)
    masses: dict[tuple[int, ...], float] = {}
    rows = log_probs[0].double()
    for path in itertools.product(range(tokens.size), repeat=4):
        ids = tuple(v for i, v in enumerate(path) if v != 0 and (i == 0 or v != path[i - 1]))
        masses[ids] = masses.get(ids, 0.0) + math.exp(float(sum(rows[t, v] for t, v in enumerate(path))))
    known = {ids: math.log(mass) for ids, mass in masses.items()
             if tokens.unk_id not in ids and set(tokens.words(ids)) <= set(WORDS)}
    for engine in ("native", "torch"):
        options = PrefixSearchOptions(beam=600, engine=engine)
        [nbest] = ctc_prefix_search(log_probs, torch.tensor([4]), options, tokens,
                                    [VocabularyFusion(WORDS, tokens, -math.inf)])
        found = {tuple(h.tokens): h.scores["ctc"] for h in nbest if h.scores["oov"] > FORBIDDEN / 2}
        assert set(found) == set(known)
        for ids, score in found.items():
            assert score == pytest.approx(known[ids], abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=8),
    extra=st.lists(st.text("abc", min_size=2, max_size=3), max_size=3, unique=True),
    path=st.lists(st.integers(0, 50), max_size=12),
)
def test_the_automaton_is_what_a_set_of_words_says(words, extra, path) -> None:
    pieces = ["<blk>", "▁", "▁a", "▁bc", "a", "b", "c", *extra]
    tokens = AcousticTokens.from_pieces(pieces, 0)
    automaton = word_automaton(words, tokens, -2.0)
    tensors = PhraseTensors([automaton], torch.device("cpu"))
    node, total, ids = torch.tensor([automaton.start]), 0.0, []
    for one in path:
        piece = 1 + one % (len(pieces) - 1)
        begins = torch.tensor([tokens.starts_word[piece]])
        change = float(tensors.score(node, torch.tensor([piece]), begins))
        assert change <= float(automaton.most[int(node)])
        total += change
        node = tensors.next(node, torch.tensor([piece]))
        ids.append(piece)
        *closed, open_word = [""] if not ids else ["".join(tokens.words(part)) for part in parts(ids, tokens)]
        alive = any(word.startswith(open_word) for word in words)
        count = sum(bool(word) and word not in words for word in closed) + (not alive)
        assert total == pytest.approx(-2.0 * count)
    done = total + float(tensors.complete[node] - tensors.pending[node])
    assert done == pytest.approx(-2.0 * sum(word not in words for word in tokens.words(ids)))


def test_a_piece_of_known_characters_is_known() -> None:
    """An n-gram over characters scores 世界, one piece, as two words; so it is no unknown one here either."""
    tokens = AcousticTokens.from_pieces(["<blk>", "世", "界", "世界", "世人"], 0)
    words, ways = ["世", "界"], {True: [0, 0, 0, -2], False: [0, 0, -2, -2]}
    for units, costs in ways.items():
        automaton = word_automaton(words, tokens, -2.0, units=units)
        assert [float(automaton.complete[automaton.from_root[piece]]) for piece in range(1, 5)] == costs
    known = word_automaton([*words, "世界"], tokens, -2.0)  # a word itself
    assert float(known.complete[known.from_root[3]]) == 0


def parts(ids: list[int], tokens: AcousticTokens) -> list[list[int]]:
    """Return the pieces of each word, the empty first one too."""
    words: list[list[int]] = [[]]
    for one in ids:
        if tokens.starts_word[one]:
            words.append([])
        words[-1].append(one)
    return words


def test_groups_and_batches_change_nothing() -> None:
    log_probs, lens = emissions(4, LETTERS)
    whole = ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=5), LETTERS,
                              [VocabularyFusion(WORDS, LETTERS, -2.0)])
    for row in range(3):
        [single] = ctc_prefix_search(log_probs[row : row + 1], lens[row : row + 1],
                                     PrefixSearchOptions(beam=5), LETTERS,
                                     [VocabularyFusion(WORDS, LETTERS, -2.0)])
        assert [h.tokens for h in single] == [h.tokens for h in whole[row]]


def test_lower_compares_letters_in_lower_case() -> None:
    upper = AcousticTokens.from_pieces(["-", "|", "A", "B"], 0, delimiter="|")
    log_probs, lens = emissions(5, upper)
    for nbest in ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=5), upper,
                                   [VocabularyFusion(["ab", "a"], upper, -2.0, lower=True)]):
        for h in nbest:
            strange = sum(word not in ("AB", "A") for word in h.words())
            assert h.scores["oov"] == pytest.approx(-2.0 * strange, abs=1e-3)


@pytest.mark.parametrize(
    "words, oov, message",
    [([], -1.0, "words must be one at least"), (["a"], 0.5, "oov_score"), (["a"], math.nan, "oov_score"),
     (["a"], -2000.0, "oov_score")],
)
def test_bad_lists_and_scores(words, oov, message) -> None:
    with pytest.raises(ValueError, match=message):
        VocabularyFusion(words, LETTERS, oov)


def test_a_word_without_letters_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one letter"):
        WordAutomaton([[1], []], [None, [1]], [False, False], -1.0)


def test_scores_of_unlike_weights_are_not_joined() -> None:
    """An n-gram that has failed in a stream has the weight 0, its list of words has not."""
    scores = {"ctc": -2.0, "wordngram": -3.0, "oov": -1.5, "words": 1.0}
    for weight, sources in ((0.3, scores.keys() - {"oov"}), (0.0, scores.keys())):
        weights = {"ctc": 1.0, "wordngram": weight, "oov": 0.3, "words": 0.2}
        total = sum(weights[source] * value for source, value in scores.items())
        [nbest] = join_oov([NBest("talk", [Hypothesis([], "sea", {**scores, "total": total})], weights)])
        assert nbest.weights.keys() == sources == nbest[0].scores.keys() - {"total"}
        assert nbest.reweight(nbest.weights)[0].total == pytest.approx(total)
