"""Decoding in chunks: equal to the whole however it is cut, with language models, hot words, several ways on.
Knows: small alphabets, random logits. Must not know: pyctcdecode itself, which need not be installed.
"""
from __future__ import annotations

import math

import numpy as np
import pytest

from icefall_fusion.compat.beams import LMBeam, without_histories
from icefall_fusion.compat.language_model import HotwordScorer, LanguageModel, MultiLanguageModel
from icefall_fusion.compat.pyctcdecode import BeamSearchDecoderCTC, build_ctcdecoder
from icefall_fusion.lm import CausalLm
from icefall_fusion.ngram.arpa import LN10
from icefall_fusion.ngram.word_ngram import WordNgram
from tests.compat.compat_tools import KNOWN, LABELS, noise
from tests.tiny import language_model


def in_chunks(decoder, logits, cuts, **options):
    """Decode logits cut before the frames ``cuts``; return the hypotheses after each chunk."""
    beams, scores, partial = decoder.get_starting_state()
    ends, found = [*cuts, len(logits)], []
    for start, stop in zip([0, *cuts], ends):
        last = {"is_end": True} if stop == len(logits) and len(found) == len(ends) - 1 else {}
        beams = decoder.partial_decode_beams(logits[start:stop], scores, partial, beams, start,
                                             **options, **last)
        found.append(beams)
    return found


def assert_same(beams, whole) -> None:
    assert [beam.text for beam in beams] == [beam.text for beam in whole]
    for beam, other in zip(beams, whole):
        assert beam.text_frames == [frames for _, frames in other.text_frames]
        assert beam.logit_score == pytest.approx(other.logit_score, abs=1e-4)
        assert beam.lm_score == pytest.approx(other.lm_score, abs=1e-4)
        assert beam[1:4] == ("", "", None) and beam.partial_frames == (-1, -1)


@pytest.mark.parametrize("cuts", [[], [1], [5, 6, 20], [0, 7, 7, 30], list(range(1, 30))])
@pytest.mark.parametrize("kind", ["plain", "words", "hot", "llm"])
def test_chunks_are_the_whole(arpa, tmp_path, cuts, kind) -> None:
    logits, options, more = noise(30, 3), {}, {"beam_width": 12}
    if kind == "words":
        decoder = build_ctcdecoder(LABELS, arpa, alpha=0.7)
    elif kind == "llm":
        lm = CausalLm.from_pretrained(language_model(tmp_path / "llm", 3, pieces=False))
        decoder = build_ctcdecoder(LABELS, arpa, llm=lm)
    else:
        decoder = build_ctcdecoder(LABELS)
    if kind == "hot":
        options["hotword_scorer"] = HotwordScorer.build_scorer(["cab", "ab b"], weight=3.0)
        more = {**more, "hotwords": ["cab", "ab b"], "hotword_weight": 3.0}
    whole = decoder.decode_beams(logits, **more)
    assert_same(in_chunks(decoder, logits, cuts, beam_width=12, **options)[-1], whole)


def test_the_documented_example() -> None:
    labels = [" ", "b", "g", "n", "s", "u", "y", ""]

    def spelled(path: list[str]) -> np.ndarray:
        probs = np.zeros((len(path), len(labels)))
        probs[range(len(path)), [labels.index(label) for label in path]] = 1
        return probs

    bugs, bunny = spelled([*"bugs", "", ""]), spelled([*"bun", "", *"ny"])
    probs = np.vstack([0.49 * bugs + 0.51 * bunny, spelled([" "]), bunny])
    logits = np.log(np.clip(probs, 1e-15, 1))
    decoder = build_ctcdecoder(labels)
    first = in_chunks(decoder, logits, [3, 8])
    assert first[0][0].partial_word.startswith("bu") and first[0][0].text == ""
    best = first[-1][0]
    assert best.text == "bunny bunny" and best.text_frames == [(0, 6), (7, 13)]
    assert best.logit_score == pytest.approx(4 * math.log(0.51), abs=1e-3)
    hot = HotwordScorer.build_scorer(["bugs"], weight=25.0)
    assert in_chunks(decoder, logits, [3, 8], hotword_scorer=hot)[-1][0].text == "bugs bunny"
    logits = np.vstack([logits, *[np.log(np.clip(np.vstack([spelled([" "]), bunny]), 1e-15, 1))] * 5])
    histories = {"beam_width": 100, "beam_prune_logp": -20.0}
    assert len(decoder.decode_beams(logits, prune_history=True, **histories)) == 1
    assert len(decoder.decode_beams(logits, **histories)) == 16


def test_hypotheses_between_chunks_have_closed_and_open_words() -> None:
    decoder = build_ctcdecoder(LABELS)
    #                    c  a  b  -  space  a  -  b  b
    path = np.array([4, 2, 3, 0, 1, 2, 0, 3, 3])
    logits = np.full((len(path), 5), -9.0)
    logits[range(len(path)), path] = 9.0
    closed, opened, done = in_chunks(decoder, logits, [5, 6])
    assert closed[0].text == "cab" and closed[0].partial_word == "" and closed[0].last_char == " "
    assert opened[0][:4] == ("cab", "", "a", "a")
    assert opened[0].text_frames == [(0, 3)] and opened[0].partial_frames == (5, 6)
    assert opened[0].lm_score == opened[0].logit_score
    assert done[0].text == "cab ab" and done[0].text_frames == [(0, 3), (5, 9)]


def test_live_scores_are_those_of_the_frames_so_far() -> None:
    logits, decoder = noise(18, 7), build_ctcdecoder(LABELS)
    wide = {"beam_width": 3000, "beam_prune_logp": -math.inf, "token_min_logp": -math.inf}
    live = in_chunks(decoder, logits[:7], [4], **wide)[0]
    whole = {beam.text: beam.logit_score for beam in decoder.decode_beams(logits[:4], **wide)}
    masses: dict[str, float] = {}
    for beam in live:
        text = " ".join([*beam.text.split(), *beam.partial_word.split()])
        masses[text] = np.logaddexp(masses.get(text, -math.inf), beam.logit_score)
    assert masses.keys() == whole.keys()
    assert all(masses[text] == pytest.approx(whole[text], abs=1e-4) for text in whole)


def test_earlier_hypotheses_go_on_another_way() -> None:
    decoder, one, other = build_ctcdecoder(LABELS), noise(20, 1), noise(20, 2)
    other[:9] = one[:9]
    start, scores, partial = decoder.get_starting_state()
    first = decoder.partial_decode_beams(one[:9], scores, partial, start, 0)
    peek = decoder.partial_decode_beams(one[:0], scores, partial, first, 9, is_end=True)
    assert_same(peek, decoder.decode_beams(one[:9]))
    for logits in (one, other, one):
        found = decoder.partial_decode_beams(logits[9:], scores, partial, first, 9, is_end=True)
        assert_same(found, decoder.decode_beams(logits))


def test_a_forced_word_ends_where_the_chunk_ends() -> None:
    decoder = build_ctcdecoder(LABELS)
    path = np.array([4, 2, 3, 3, 2])  # cab|ba
    logits = np.full((len(path), 5), -9.0)
    logits[range(len(path)), path] = 9.0
    beams, scores, partial = decoder.get_starting_state()
    beams = decoder.partial_decode_beams(logits[:3], scores, partial, beams, 100, force_next_word=True)
    assert beams[0].text == "cab" and beams[0].text_frames == [(100, 103)] and beams[0].partial_word == ""
    beams = decoder.partial_decode_beams(logits[3:], scores, partial, beams, 103, is_end=True)
    assert beams[0].text == "cab ba" and beams[0].text_frames == [(100, 103), (103, 105)]
    bpe = build_ctcdecoder(["▁a", "b", ""])
    with pytest.raises(ValueError, match="force_next_word.*without a space"):
        beams = bpe.get_starting_state()[0]
        bpe.partial_decode_beams(np.zeros((2, 3)), {}, {}, beams, 0, force_next_word=True)


@pytest.mark.parametrize(
    "change, message",
    [({"beams": []}, "beams"), ({"processed_frames": 3}, "processed_frames.*be 4"),
     ({"processed_frames": -1}, "processed_frames"), ({"beam_width": 7}, "same for all chunks"),
     ({"hotword_scorer": HotwordScorer.build_scorer(["ab"])}, "same for all chunks"),
     ({"hotword_scorer": ["ab"]}, "hotword_scorer"), ({"logits": np.zeros((3, 4))}, "5 labels")],
)
def test_bad_chunks(change, message) -> None:
    decoder = build_ctcdecoder(LABELS)
    beams, scores, partial = decoder.get_starting_state()
    beams = decoder.partial_decode_beams(noise(4), scores, partial, beams, 0)
    given = {"logits": noise(3), "cached_lm_scores": scores, "cached_p_lm_scores": partial, "beams": beams,
             "processed_frames": 4}
    with pytest.raises(ValueError, match=message):
        decoder.partial_decode_beams(**{**given, **change})
    ended = decoder.partial_decode_beams(**given, is_end=True)
    with pytest.raises(ValueError, match="is_end"):
        decoder.partial_decode_beams(**{**given, "beams": ended, "processed_frames": 7})


# --- what else the decoder has of pyctcdecode ---------------------------------------------------------------


def test_histories_that_an_n_gram_does_not_see_are_pruned() -> None:
    texts = ["a gandalf owns", "b gandalf owns", "d gandalf sells", "e gandalf owns"]
    parts = ["potatoes", "potatoes", "yeast", "yeast"]
    beams = [LMBeam(text, "", part, "s", [], (-1, -1), -1.0, -1.0) for text, part in zip(texts, parts)]
    assert without_histories(beams, 3) == [beams[0], beams[2], beams[3]]
    assert without_histories(beams, 4) == beams
    decoder, logits = build_ctcdecoder(LABELS), noise(40, 4)
    pruned = decoder.decode_beams(logits, prune_history=True)
    endings = [tuple(beam.text.split()[-2:]) for beam in pruned]
    assert len(endings) == len(set(endings)) < len(decoder.decode_beams(logits))
    assert pruned[0] == decoder.decode_beams(logits)[0]
    assert len(decoder.decode_beams_batch(None, [logits], prune_history=True)[0]) == len(pruned)


def test_several_language_models_are_their_mean(arpa) -> None:
    logits, alphabet = noise(20, 5), build_ctcdecoder(LABELS)._alphabet
    ngram = WordNgram(arpa)
    one, other = LanguageModel(arpa, alpha=0.9, beta=0.3), LanguageModel(arpa, ["ab"], alpha=0.2, beta=1.1)
    both = BeamSearchDecoderCTC(alphabet, MultiLanguageModel([one, other])).decode_beams(logits)
    assert len(both) > 5
    for beam in both:
        words = beam.text.split()
        first = 0.9 * (ngram.log_prob(words) - 10 * LN10 * sum(w not in KNOWN for w in words))
        second = 0.2 * (ngram.log_prob(words) - 10 * LN10 * sum(w != "ab" for w in words))
        expected = (first + second + (0.3 + 1.1) * len(words)) / 2
        assert beam.lm_score - beam.logit_score == pytest.approx(expected, abs=3e-3)
    twice = BeamSearchDecoderCTC(alphabet, MultiLanguageModel([one, one]))
    plain = BeamSearchDecoderCTC(alphabet, one).decode_beams(logits)
    assert [b.text for b in twice.decode_beams(logits)] == [b.text for b in plain]
    assert twice.decode_beams(logits)[0].last_lm_state == plain[0].last_lm_state
    with pytest.raises(ValueError, match="two LanguageModels"):
        MultiLanguageModel([one])
    with pytest.raises(ValueError, match="one LanguageModel"):
        twice.save_to_dir(str(arpa.parent / "saved"))
    with pytest.raises(ValueError, match="reset_params"):
        twice.reset_params(alpha=1.0)


def test_a_kenlm_model_is_read_by_its_path(arpa) -> None:
    kenlm = pytest.importorskip("kenlm")
    logits, alphabet = noise(15, 6), build_ctcdecoder(LABELS)._alphabet
    ours = BeamSearchDecoderCTC(alphabet, LanguageModel(kenlm.Model(str(arpa)), alpha=0.5, beta=1.5))
    assert ours.decode_beams(logits) == build_ctcdecoder(LABELS, arpa).decode_beams(logits)


def test_a_decoder_comes_from_the_hub(arpa, tmp_path, monkeypatch) -> None:
    revision, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "cache"
    folder = cache / "models--someone--words"
    decoder = build_ctcdecoder(LABELS, arpa, alpha=0.7)
    decoder.save_to_dir(str(folder / "snapshots" / revision))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    loaded = BeamSearchDecoderCTC.load_from_hf_hub("someone/words", cache, local_files_only=True)
    assert loaded.decode_beams(noise(12)) == decoder.decode_beams(noise(12))
    home = tmp_path / "home"
    (home / ".cache").mkdir(parents=True)
    cache.rename(home / ".cache" / "pyctcdecode")
    monkeypatch.setenv("HOME", str(home))
    BeamSearchDecoderCTC.load_from_hf_hub("someone/words", revision=revision, local_files_only=True)
    with pytest.raises(FileNotFoundError):
        BeamSearchDecoderCTC.load_from_hf_hub("someone/other", local_files_only=True)
