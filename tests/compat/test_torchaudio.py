"""The calls of torchaudio: tokens, words, frames and scores; lexicons; language models; streams; bad input.
Knows: small vocabularies, random emissions. Must not know: how a search works.
"""
from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from icefall_fusion.compat.alignment import first_frames
from icefall_fusion.compat.lexicon import read_lexicon
from icefall_fusion.compat.torchaudio import CTCHypothesis, ctc_decoder, cuda_ctc_decoder
from icefall_fusion.lm import CausalLm
from icefall_fusion.ngram.arpa import LN10
from icefall_fusion.ngram.piece_ngram import PieceNgram
from icefall_fusion.ngram.word_ngram import WordNgram
from tests.tiny import arpa_text, language_model

TOKENS = ["-", "|", "a", "b", "c"]
LEXICON = "ab a b |\ncab c a b |\nabba a b b a |\nbee b |\n"
WORDS = ["ab", "cab", "abba", "bee"]
ARPA = arpa_text("""
-2.0\t<unk>\t0
-99\t<s>\t-0.5
-1.0\t</s>
-0.9\tab\t-0.25
-0.7\tcab\t-0.3
""", """
-0.3\t<s> cab
-0.2\tab cab
""")


@pytest.fixture
def lexicon(tmp_path):
    (tmp_path / "lexicon.txt").write_text(LEXICON)
    return tmp_path / "lexicon.txt"


def noise(batch: int, frames: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(batch, frames, len(TOKENS), generator=torch.Generator().manual_seed(seed))


def spoken(path: list[int]) -> torch.Tensor:
    emissions = torch.zeros(1, len(path), len(TOKENS))
    emissions[0, range(len(path)), path] = 6.0
    return emissions


def name(hypothesis: CTCHypothesis) -> tuple:
    """Return what tells hypotheses apart: those with an own silence at an end have other frames."""
    return tuple(hypothesis.tokens.tolist()), tuple(hypothesis.timesteps.tolist())


#                 c  a  -  b  -  |  -  a  a  b  -  -
PATH = spoken([4, 2, 0, 3, 0, 1, 0, 2, 2, 3, 0, 0])


def test_tokens_and_frames_have_silences_at_their_ends(lexicon) -> None:
    for words, path in ([], None), (["cab", "ab"], lexicon):
        [[best, *_]] = ctc_decoder(path, TOKENS, nbest=3)(PATH)
        assert best.tokens.tolist() == [1, 4, 2, 3, 1, 2, 3, 1] and best.words == words
        assert best.timesteps.tolist() == [0, 1, 2, 4, 6, 8, 10, 13]
        assert best.tokens.dtype == torch.int64 and best.timesteps.dtype == torch.int32
    assert ctc_decoder(None, TOKENS).idxs_to_tokens(best.tokens[:3]) == ["|", "c", "a"]


def test_scores_are_sums_over_all_alignments_of_emissions() -> None:
    emissions = noise(1, 4, 3)
    masses: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(5), repeat=4):
        ids = tuple(v for i, v in enumerate(path) if v and (i == 0 or v != path[i - 1]))
        score = float(sum(emissions[0, t, v] for t, v in enumerate(path)))
        masses[ids] = masses.get(ids, 0.0) + math.exp(score)
    found = ctc_decoder(None, TOKENS, nbest=500, beam_size=700, beam_threshold=math.inf)(emissions)[0]
    for hypothesis, expected in zip(found, sorted(masses.values(), reverse=True)):
        assert hypothesis.score == pytest.approx(math.log(expected), abs=1e-3)


@pytest.mark.parametrize("unk_score", [-math.inf, -4.0])
def test_a_lexicon_holds_the_search_to_its_words(lexicon, unk_score) -> None:
    decoder = ctc_decoder(lexicon, TOKENS, nbest=30, beam_size=60, word_score=-0.5, unk_score=unk_score)
    found = [h for some in decoder(noise(4, 25, 1)) for h in some]
    strange = sum(word not in WORDS for h in found for word in h.words)
    assert len(found) > 40 and any(len(h.words) > 2 for h in found)
    assert (strange == 0) == (unk_score == -math.inf)


def test_a_lexicon_of_pieces_that_begin_words(tmp_path) -> None:
    (tmp_path / "bpe.txt").write_text("HE ▁h e\nHI ▁h i\nHI ▁hi\n")
    tokens = ["-", "▁h", "e", "i", "▁hi"]
    emissions = torch.zeros(1, 6, 5)
    emissions[0, range(6), [1, 2, 0, 4, 1, 3]] = 6.0
    [[best]] = ctc_decoder(tmp_path / "bpe.txt", tokens)(emissions)
    assert best.words == ["HE", "HI", "HI"] and best.tokens.tolist() == [1, 2, 4, 1, 3]
    assert best.timesteps.tolist() == [1, 2, 4, 5, 6]


def test_word_scores_and_a_word_ngram_join(lexicon, tmp_path) -> None:
    (tmp_path / "words.arpa").write_text(ARPA)
    ngram = WordNgram(tmp_path / "words.arpa")
    plain = ctc_decoder(lexicon, TOKENS, nbest=2000, beam_size=2000, beam_threshold=math.inf)
    fused = ctc_decoder(lexicon, TOKENS, str(tmp_path / "words.arpa"), nbest=2000, beam_size=2000,
                        beam_threshold=math.inf, lm_weight=1.5, word_score=0.7, sil_score=0.2)
    emissions = noise(1, 9, 4)
    acoustic = {name(h): h.score for h in plain(emissions)[0]}
    found = fused(emissions)[0]
    assert len(found) == len(acoustic) > 10
    for h in found:
        part = 1.5 * ngram.log_prob(h.words) / LN10 + 0.9 * len(h.words)
        assert h.score == pytest.approx(acoustic[name(h)] + part, abs=2e-3)


def test_without_a_lexicon_an_ngram_is_over_tokens(tmp_path) -> None:
    text = ARPA.replace("cab", "a").replace("ab", "b").replace("<unk>", "c")
    (tmp_path / "tokens.arpa").write_text(text)
    decoder = ctc_decoder(None, TOKENS, str(tmp_path / "tokens.arpa"), nbest=5, beam_size=400, lm_weight=1.0)
    ngram = PieceNgram.load(tmp_path / "tokens.arpa", TOKENS)
    emissions = noise(1, 6, 5)
    acoustic = ctc_decoder(None, TOKENS, nbest=400, beam_size=400)(emissions)[0]
    acoustic = {name(h): h.score for h in acoustic}
    for h in decoder(emissions)[0]:
        inner = h.tokens.tolist()
        inner = inner[1 if h.timesteps[0] == 0 else 0 : -1 if h.timesteps[-1] == 7 else None]
        ids = torch.tensor([ngram.start_id, *inner, ngram.end_id])
        part = float(ngram.score_sentences(ids)[0].sum()) / LN10
        assert h.score == pytest.approx(acoustic[name(h)] + part, abs=2e-3)


def test_an_llm_joins(lexicon, tmp_path) -> None:
    lm = CausalLm.from_pretrained(language_model(tmp_path / "llm", 3, pieces=False))
    emissions = noise(1, 8, 6)
    acoustic = ctc_decoder(lexicon, TOKENS, nbest=900, beam_size=900)(emissions)[0]
    acoustic = {name(h): h.score for h in acoustic}
    for h in ctc_decoder(lexicon, TOKENS, lm, nbest=4, beam_size=900, lm_weight=0.3)(emissions)[0]:
        part = 0.3 * lm.log_prob(" ".join(h.words), eos=True)
        assert h.score == pytest.approx(acoustic[name(h)] + part, abs=5e-3)


def test_a_stream_is_the_whole_however_it_is_cut(lexicon) -> None:
    decoder, emissions = ctc_decoder(lexicon, TOKENS, nbest=3), noise(1, 30, 7)
    [whole] = decoder(emissions)
    for cuts in ([30], [1, 7, 22], [10, 0, 10, 10]):
        decoder.decode_begin()
        for part in emissions[0].split(cuts):
            decoder.decode_step(part)
        decoder.decode_end()
        for one, other in zip(decoder.get_final_hypothesis(), whole):
            assert one.tokens.tolist() == other.tokens.tolist() and one.words == other.words
            assert one.timesteps.tolist() == other.timesteps.tolist()
            assert one.score == pytest.approx(other.score, abs=1e-3)


def test_a_batch_is_its_utterances(lexicon) -> None:
    decoder, emissions = ctc_decoder(lexicon, TOKENS, nbest=2), noise(3, 20, 8)
    lengths = torch.tensor([20, 13, 0])
    for row, some in enumerate(decoder(emissions, lengths)):
        [single] = decoder(emissions[row : row + 1, : lengths[row]])
        assert [h.tokens.tolist() for h in some] == [h.tokens.tolist() for h in single]
        assert [h.timesteps.tolist() for h in some] == [h.timesteps.tolist() for h in single]


def test_the_gpu_decoders_calls() -> None:
    log_probs = noise(2, 20, 9).log_softmax(-1)
    lens = torch.tensor([20, 11], dtype=torch.int32)
    found = cuda_ctc_decoder(TOKENS, nbest=2, beam_size=6, blank_skip_threshold=1)(log_probs, lens)
    same = ctc_decoder(None, TOKENS, nbest=2, beam_size=6)(log_probs, lens)
    for some, others in zip(found, same):
        for one, other in zip(some, others):
            assert [TOKENS[v] for v in one.tokens] == one.words
            assert one.score == pytest.approx(other.score, abs=1e-3)
    with pytest.raises(ValueError, match="blank_skip_threshold"):
        cuda_ctc_decoder(TOKENS, blank_skip_threshold=0.1)


def test_the_alignment_is_the_best_of_all() -> None:
    log_probs = noise(1, 6, 10).log_softmax(-1)
    for ids in ([2], [2, 2], [3, 1, 4], [], [2, 2, 2]):
        best, frames = -math.inf, []
        for path in itertools.product(range(5), repeat=6):
            starts = [i for i, v in enumerate(path) if v and (i == 0 or v != path[i - 1])]
            score = float(sum(log_probs[0, t, v] for t, v in enumerate(path)))
            if [path[i] for i in starts] == ids and score > best:
                best, frames = score, starts
        assert first_frames(log_probs, [6], [0], [ids], 0) == [frames]


@pytest.mark.parametrize(
    "text, message",
    [("ab a b |\ncab\n", "lexicon.txt:2 must have a spelling"), ("", "at least one word"),
     ("ab a x |\n", "'ab' must hold pieces.*'x'"), ("ab a b\n", "must end with '|'"),
     ("ab |\n", "'ab' must have a spelling"), ("ab a | b |\n", "nowhere else")],
)
def test_bad_lexicons(tmp_path, text, message) -> None:
    (tmp_path / "lexicon.txt").write_text(text)
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        ctc_decoder(tmp_path / "lexicon.txt", TOKENS)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"tokens": ["-", "a", "a"]}, ValueError, "differ"),
        ({"blank_token": "_"}, ValueError, "blank_token"),
        ({"nbest": 0}, ValueError, "nbest"), ({"beam_size": 1.5}, ValueError, "beam_size"),
        ({"lm_weight": math.nan}, ValueError, "lm_weight"), ({"lm": object()}, TypeError, "CausalLm"),
        ({"lm": "no.arpa"}, FileNotFoundError, "no.arpa"), ({"lm_dict": 3}, ValueError, "lm_dict"),
        ({"lexicon": "no.txt"}, FileNotFoundError, "no.txt"), ({"tokens": "no"}, FileNotFoundError, "no"),
    ],
)
def test_bad_arguments(change, error, message) -> None:
    with pytest.raises(error, match=message):
        ctc_decoder(**{"lexicon": None, "tokens": TOKENS, **change})


@pytest.mark.parametrize(
    "emissions, message",
    [(torch.zeros(1, 4, 6), "5 tokens"), (torch.zeros(4, 5), "3 dimensions"),
     (torch.full((1, 4, 5), math.nan), "numbers"), (np.zeros((1, 4, 5)), "tensor")],
)
def test_bad_emissions(emissions, message) -> None:
    with pytest.raises(ValueError, match=message):
        ctc_decoder(None, TOKENS)(emissions)


def test_files_of_tokens_and_words_with_several_spellings(tmp_path) -> None:
    (tmp_path / "tokens.txt").write_text("- <blank>\n|\na\nb\n")
    assert ctc_decoder(None, tmp_path / "tokens.txt").idxs_to_tokens(torch.tensor([0, 3])) == ["-", "b"]
    (tmp_path / "lexicon.txt").write_text("one a |\none b |\n\ntwo a |\n")
    assert [word for word, _ in read_lexicon(tmp_path / "lexicon.txt")] == ["one", "one", "two"]
