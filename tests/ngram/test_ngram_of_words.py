"""N-grams over words: by hand, own reader against KenLM, in the search against a slow twin and beside an LLM.
Knows: ARPA files, small searches. Must not know: trained models.
"""
from __future__ import annotations

import copy
import gc
import importlib.util
import math
import pickle
import weakref
from pathlib import Path

import numpy as np
import pytest

from icefall_fusion.fusion import DelayedFusion, FixedInterval, ShortestHypothesis, WordNgramFusion
from icefall_fusion.fusion.retokenize import WordTokenizer
from icefall_fusion.ngram.arpa import LN10, write_arpa
from icefall_fusion.ngram.kneser_ney import count_ngrams, kneser_ney
from icefall_fusion.ngram.word_ngram import START_ID, WordNgram
from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search
from tests.fusion.test_fusion import (
    SLOW_TRIGGERS,
    TRIGGERS,
    assert_same,
    compare_with_twin,
    emissions,
    llm,  # noqa: F401 (a fixture)
    names,
    slow_delayed,
    tokens,  # noqa: F401 (a fixture)
)
from tests.reference.fused_search import SlowFusion
from tests.tiny import arpa_text

KENLM = importlib.util.find_spec("kenlm") is not None
READERS = ["own", pytest.param("kenlm", marks=pytest.mark.skipif(not KENLM, reason="needs kenlm"))]
BY_HAND = arpa_text("""
-2.0\t<unk>
-99\t<s>\t-0.5
-1.0\t</s>
-0.5\tthe\t-0.25
-1.5\tsea\t-0.125
""", """
-0.3\t<s> the
-0.2\tthe sea
-0.4\tsea </s>
""")


@pytest.fixture(params=READERS)
def by_hand(request, tmp_path) -> WordNgram:
    (tmp_path / "words.arpa").write_text(BY_HAND)
    return WordNgram(tmp_path / "words.arpa", reader=request.param, oov_score=-3.0)


def trained(folder: Path, order: int = 3, seed: int = 0) -> Path:
    """Write an n-gram over words that the tests' pieces spell, estimated from random texts."""
    words = ["<unk>", "a", "the", "se", "sea", "b", "bing", "i", "it", "ad"]
    rng = np.random.default_rng(seed)
    texts = [rng.integers(1, len(words), rng.integers(1, 8)) for _ in range(40)]
    stream = np.array([i for text in texts for i in (0, *text, 0)], np.uint16)
    ends = np.cumsum([len(text) + 2 for text in texts])
    bounds = np.stack([ends - [len(text) + 2 for text in texts], ends], axis=1)
    path = folder / "trained.arpa"
    write_arpa(path, kneser_ney(count_ngrams(stream, bounds, len(words), order), len(words)), words)
    return path


@pytest.fixture(scope="module")
def ngram(tmp_path_factory) -> WordNgram:
    return WordNgram(trained(tmp_path_factory.mktemp("words")), oov_score=-2.0, reader="own")


# --- scores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, log10",
    [
        ("the sea", -0.3 - 0.2 - 0.4),
        ("sea the", -0.5 - 1.5 - 0.125 - 0.5 - 0.25 - 1.0),  # back-offs of <s>, sea, the
        ("the", -0.3 - 0.25 - 1.0),
        ("", -0.5 - 1.0),
    ],
)
def test_scores_by_hand(by_hand, text, log10) -> None:
    assert by_hand.order == 2
    assert by_hand.log_prob(text.split()) == pytest.approx(log10 * LN10, abs=1e-5)


def test_without_boundary_no_start_is_known_and_no_end_is_scored(by_hand) -> None:
    assert by_hand.log_prob(["the", "sea"], boundary=False) == pytest.approx((-0.5 - 0.2) * LN10, abs=1e-5)


def test_an_unknown_word_has_the_score_of_unk_and_the_oov_score(by_hand) -> None:
    expected = (-0.3 - 0.25 - 2.0 - 1.5 - 0.4) * LN10 - 3.0
    assert by_hand.log_prob(["the", "zebra", "sea"]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("reader", READERS)
def test_a_word_outside_the_unigrams_has_the_oov_score_too(tmp_path, reader) -> None:
    (tmp_path / "words.arpa").write_text(BY_HAND)
    ngram = WordNgram(tmp_path / "words.arpa", unigrams=["the"], oov_score=-3.0, reader=reader)
    assert ngram.log_prob(["the", "sea"]) == pytest.approx((-0.3 - 0.2 - 0.4) * LN10 - 3.0, abs=1e-5)


@pytest.mark.skipif(not KENLM, reason="needs kenlm")
@pytest.mark.parametrize("order", [2, 3, 5])
def test_the_own_reader_scores_as_kenlm_does(tmp_path, order) -> None:
    path = trained(tmp_path, order)
    own, kenlm = (WordNgram(path, reader=reader, oov_score=-1.0) for reader in ("own", "kenlm"))
    assert own.order == kenlm.order == order
    rng = np.random.default_rng(1)
    words = ["a", "the", "se", "sea", "b", "bing", "i", "it", "ad", "zzz"]
    for _ in range(60):
        text = [words[i] for i in rng.integers(0, len(words), rng.integers(0, 9))]
        for boundary in (True, False):
            expected = kenlm.log_prob(text, boundary)
            assert own.log_prob(text, boundary) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("reader", READERS)
def test_a_copy_and_a_pickle_score_the_same(tmp_path, reader) -> None:
    (tmp_path / "words.arpa").write_text(BY_HAND)
    ngram = WordNgram(tmp_path / "words.arpa", unigrams=["the"], oov_score=-3.0, reader=reader)
    for other in (copy.deepcopy(ngram), pickle.loads(pickle.dumps(ngram))):
        assert other.log_prob(["the", "sea"]) == ngram.log_prob(["the", "sea"])


# --- bad files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("keep", [0.95, 0.5, 0.02, 0.0])
def test_a_file_that_is_cut_short_is_refused_by_name(tmp_path, reader, keep) -> None:
    path = tmp_path / "cut.arpa"
    path.write_text(BY_HAND[: int(keep * len(BY_HAND))])
    with pytest.raises(ValueError, match="cut.arpa"):
        WordNgram(path, reader=reader)


@pytest.mark.parametrize("reader", READERS)
def test_a_truncated_binary_is_refused_by_name(tmp_path, reader) -> None:
    path = tmp_path / "cut.bin"
    path.write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0" + b"\0" * 20)
    with pytest.raises(ValueError, match="cut.bin"):
        WordNgram(path, reader=reader)


def test_a_binary_without_kenlm_names_the_remedy(tmp_path, monkeypatch) -> None:
    path = tmp_path / "words.bin"
    path.write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install kenlm"):
        WordNgram(path)


def test_without_kenlm_one_warning_names_the_own_reader(tmp_path, monkeypatch, caplog) -> None:
    (tmp_path / "words.arpa").write_text(BY_HAND)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert WordNgram(tmp_path / "words.arpa").log_prob(["the"]) == pytest.approx(-1.55 * LN10, abs=1e-5)
    assert caplog.text.count("our own reader") == 1


def test_too_long_n_grams_name_order_and_remedy(tmp_path) -> None:
    words = [f"-2 w{i} 0" for i in range(2000)]
    text = "\\data\\\nngram 1=2000\n" + "".join(f"ngram {n}=0\n" for n in range(2, 8)) + "\n\\1-grams:\n"
    path = tmp_path / "long.arpa"
    path.write_text(text + "\n".join(words) + "\n\n\\end\\\n")
    with pytest.raises(ValueError, match="at most 5 for 2000 words.*kenlm.*7"):
        WordNgram(path, reader="own")


@pytest.mark.parametrize(
    "change, message",
    [({"reader": "fast"}, "WordNgram.reader"), ({"oov_score": math.nan}, "oov_score"),
     ({"unigrams": "the"}, "unigrams"), ({"unigrams": [1]}, "unigrams")],
)
def test_bad_options(tmp_path, change, message) -> None:
    (tmp_path / "words.arpa").write_text(BY_HAND)
    with pytest.raises(ValueError, match=message):
        WordNgram(tmp_path / "words.arpa", **change)


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="none.arpa"):
        WordNgram(tmp_path / "none.arpa")


# --- in the search ------------------------------------------------------------------------------------------


def slow(ngram: WordNgram, weight: float, bonus: float, trigger: tuple, boundary: bool = True) -> SlowFusion:
    def score(words):
        if not boundary:
            return ngram.log_prob(words, False)
        return ngram.log_prob(words) - end_after(ngram, words)

    return SlowFusion("wordngram", weight, bonus, lambda _, words: ngram.log_prob(words, boundary),
                      word_score=score, trigger=trigger)


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("trigger", TRIGGERS, ids=names)
def test_a_search_is_its_slow_twin(ngram, tokens, trigger, engine) -> None:  # noqa: F811
    log_probs, lens = emissions(seed=2)
    options = PrefixSearchOptions(beam=4, engine=engine)
    nbests = ctc_prefix_search(log_probs, lens, options, tokens, [WordNgramFusion(ngram, 0.5, 0.7, trigger)])
    twin = slow(ngram, 0.5, 0.7, SLOW_TRIGGERS[type(trigger).__name__](trigger))
    compare_with_twin(nbests, log_probs, lens, 4, tokens, [twin])
    assert any(len(h.words()) > 2 for nbest in nbests for h in nbest)


@pytest.mark.parametrize("reader", READERS)
def test_scores_are_those_of_the_whole_text(tmp_path, tokens, reader) -> None:  # noqa: F811
    ngram = WordNgram(trained(tmp_path), oov_score=-2.0, reader=reader)
    log_probs, lens = emissions(batch=4, seed=3)
    for boundary in (True, False):
        fusion = WordNgramFusion(ngram, 0.6, 0.8, boundary=boundary)
        nbests = ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=5), tokens, [fusion])
        for hypothesis in (h for nbest in nbests for h in nbest):
            expected = ngram.log_prob(hypothesis.words(), boundary)
            assert hypothesis.scores["wordngram"] == pytest.approx(expected, abs=1e-4)
    assert fusion.stats()["word_ngram_words"] > 0


def test_an_ngram_goes_when_its_user_goes(tmp_path, tokens) -> None:  # noqa: F811
    ngram = WordNgram(trained(tmp_path))
    log_probs, lens = emissions(seed=3)
    options = PrefixSearchOptions(beam=4)
    assert ctc_prefix_search(log_probs, lens, options, tokens, [WordNgramFusion(ngram, 0.5)])
    gone = weakref.ref(ngram)
    del ngram
    gc.collect()
    assert gone() is None


def test_weight_zero_is_no_ngram_bit_for_bit(ngram, tokens) -> None:  # noqa: F811
    log_probs, lens = emissions(batch=4)
    options = PrefixSearchOptions(beam=6)
    bare = ctc_prefix_search(log_probs, lens, options, tokens)
    fused = ctc_prefix_search(log_probs, lens, options, tokens, [WordNgramFusion(ngram, 0.0)])
    for one, other in zip(fused, bare):
        assert [(h.tokens, h.scores["ctc"]) for h in one] == [(h.tokens, h.scores["ctc"]) for h in other]


@pytest.mark.parametrize("trigger", [ShortestHypothesis(), FixedInterval(3)], ids=names)
def test_scoring_by_arrays_is_that_by_tensors_bit_for_bit(ngram, tokens, trigger) -> None:  # noqa: F811
    class ByTensors(WordNgramFusion):
        _launch = DelayedFusion._launch

    log_probs, lens = emissions(batch=4, seed=6)
    for engine in ("native", "torch"):
        options = PrefixSearchOptions(beam=6, engine=engine)
        one, other = (kind(ngram, 0.37, 0.71, trigger) for kind in (WordNgramFusion, ByTensors))
        found = [ctc_prefix_search(log_probs, lens, options, tokens, [fusion]) for fusion in (one, other)]
        assert found[0] == found[1]
        for name in ("events", "histories_scored", "word_ngram_words", "word_cache_hits"):
            assert one.stats().get(name) == other.stats().get(name)


def test_a_batch_is_its_utterances(ngram, tokens) -> None:  # noqa: F811
    log_probs, lens = emissions(batch=5, seed=4)
    options = PrefixSearchOptions(beam=5)
    together = ctc_prefix_search(log_probs, lens, options, tokens, [WordNgramFusion(ngram, 0.5, 0.5)])
    for one, rows, length in zip(together, log_probs, lens):
        single = ctc_prefix_search(rows[None], length[None], options, tokens,
                                   [WordNgramFusion(ngram, 0.5, 0.5)])
        assert_same([one], single)


def test_earlier_words_are_a_context(ngram, tokens) -> None:  # noqa: F811
    log_probs, lens = emissions(batch=1, seed=5)
    fusion = WordNgramFusion(ngram, 0.5, prompt="the sea")
    nbests = ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=4), tokens, [fusion])
    before = ngram.log_prob(["the", "sea"]) - end_after(ngram, ["the", "sea"])
    for hypothesis in nbests[0]:
        expected = ngram.log_prob(["the", "sea", *hypothesis.words()]) - before
        assert hypothesis.scores["wordngram"] == pytest.approx(expected, abs=1e-4)


def end_after(ngram: WordNgram, words: list[str]) -> float:
    ids = np.array([START_ID, *map(ngram.word_id, words)])
    return float(ngram.open().ends(np.arange(-1, len(words)), ids, np.array([len(words)]))[0])


@pytest.mark.parametrize("trigger", [ShortestHypothesis(every=4), FixedInterval(3)], ids=names)
def test_beside_an_llm_it_is_its_slow_twin_and_shares_the_stops(
    llm, ngram, tokens, trigger  # noqa: F811
) -> None:
    log_probs, lens = emissions(seed=6)
    fusions = [WordNgramFusion(ngram, 0.4, 0.3, trigger), DelayedFusion(llm, 0.3, 0.4, trigger)]
    found = {}
    for engine in ("native", "torch"):
        options = PrefixSearchOptions(beam=4, engine=engine)
        found[engine] = ctc_prefix_search(log_probs, lens, options, tokens, fusions)
        kind = SLOW_TRIGGERS[type(trigger).__name__](trigger)
        twins = [slow(ngram, 0.4, 0.3, kind), slow_delayed(llm, 0.3, 0.4, kind)]
        compare_with_twin(found[engine], log_probs, lens, 4, tokens, twins)
    assert_same(found["native"], found["torch"])


@pytest.mark.parametrize("late", [0, 3])
def test_fusions_with_other_stops_or_late_scores_are_the_same_in_both_engines(
    llm, ngram, tokens, late  # noqa: F811
) -> None:
    log_probs, lens = emissions(batch=4, seed=7)
    triggers = [FixedInterval(4), FixedInterval(4 if late else 5)]
    found = []
    for engine in ("native", "torch"):
        fusions = [WordNgramFusion(ngram, 0.4, 0.3, triggers[0]),
                   DelayedFusion(llm, 0.3, 0.4, triggers[1], late=late)]
        options = PrefixSearchOptions(beam=4, engine=engine)
        found.append(ctc_prefix_search(log_probs, lens, options, tokens, fusions))
    assert_same(*found)


def test_words_of_scripts_without_spaces(tmp_path) -> None:
    """Each character is a word, in a text that stands together too; longer words that are known are one."""
    path = tmp_path / "zh.arpa"
    path.write_text(arpa_text("-2.0\t<unk>\n-99\t<s>\n-1.0\t</s>\n-0.5\t你\n-0.6\t好\n-0.7\t世界\n-0.8\tthe\n"),
                    encoding="utf-8")
    ngram = WordNgram(path, reader="own")
    lm = WordNgramFusion(ngram, 1.0).lm
    words = WordTokenizer(lm.tokenizer)

    def spelled(ids: list[int]) -> list[str]:
        return lm.tokenizer.convert_ids_to_tokens(ids)

    for given, expected in [
        (["你", "好", "世界"], ["你", "好", "世界"]),
        (["the", "cat", "你", "好"], ["the", "cat", "你", "好"]),
        (["你好", "the"], ["你", "好", "the"]), (["café", "the"], ["café", "the"]),
    ]:
        for prompted in (False, True):
            assert spelled(words.encode(given, prompted)) == expected
            assert spelled(words.encode_whole(given, prompted)) == expected
    assert words.word_by_word
    assert spelled(lm.encode("the 你好")) == ["the", "你", "好"]
    alone = WordNgramFusion(WordNgram(path, reader="own", units=False), 1.0).lm.tokenizer
    assert alone.convert_ids_to_tokens(alone.encode("你好 the")) == ["你好", "the"]
