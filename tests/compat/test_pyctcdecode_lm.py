"""pyctcdecode's calls with an n-gram over words and an LLM: totals, states, parameters, folders, bad files.
Knows: small alphabets and models. Must not know: pyctcdecode itself, which need not be installed.
"""
from __future__ import annotations

import importlib.util
import json
import math
import sys

import numpy as np
import pytest

from icefall_fusion.compat import pyctcdecode as compat
from icefall_fusion.compat.language_model import LmState
from icefall_fusion.compat.pyctcdecode import BeamSearchDecoderCTC, build_ctcdecoder
from icefall_fusion.lm import CausalLm
from icefall_fusion.ngram.arpa import LN10
from icefall_fusion.ngram.word_ngram import WordNgram
from tests.compat.compat_tools import ARPA, KNOWN, LABELS, noise
from tests.tiny import hugging_face_ctc, language_model


def lm_part(ngram: WordNgram, text: str, alpha: float, beta: float, offset: float, known=KNOWN) -> float:
    words = text.split()
    oov = sum(word not in known for word in words) * offset * LN10
    return alpha * (ngram.log_prob(words) + oov) + beta * len(words)


def test_totals_are_the_acoustic_score_and_the_weighted_n_gram(arpa) -> None:
    decoder = build_ctcdecoder(LABELS, arpa, alpha=0.6, beta=0.4, unk_score_offset=-3.0)
    ngram = WordNgram(arpa)
    for seed in range(3):
        beams = decoder.decode_beams(noise(25, seed), beam_width=30)
        for beam in beams:
            part = lm_part(ngram, beam.text, 0.6, 0.4, -3.0)
            assert beam.lm_score - beam.logit_score == pytest.approx(part, abs=2e-3)
            assert beam.last_lm_state == LmState(tuple(beam.text.split()))
        assert beams[0].lm_score == max(beam.lm_score for beam in beams)


def test_known_words_win_over_likelier_letters(arpa) -> None:
    logits = np.full((11, 5), -4.0, np.float32)
    for frame, (sure, other) in enumerate(["c-", "a-", "b-", "--", " -", "a-", "bc", "--", "cb", "--", "a-"]):
        logits[frame, LABELS.index(sure.replace("-", ""))] = 3.0
        logits[frame, LABELS.index(other.replace("-", ""))] = 2.5 if other != "-" else -4.0
        logits[frame, LABELS.index(sure.replace("-", ""))] = 3.0
    assert build_ctcdecoder(LABELS).decode(logits) == "cab abca"
    assert build_ctcdecoder(LABELS, arpa).decode(logits) == "cab abba"


def test_unigrams_are_the_known_words(arpa) -> None:
    decoder = build_ctcdecoder(LABELS, arpa, unigrams=["ab", "cab", "zebra"], alpha=1.0, beta=0.0)
    assert decoder.model_container[decoder._model_key].words == ["ab", "cab"]
    ngram = WordNgram(arpa)
    for beam in decoder.decode_beams(noise(14, 3), beam_width=20):
        part = lm_part(ngram, beam.text, 1.0, 0.0, -10.0, ["ab", "cab"])
        assert beam.lm_score - beam.logit_score == pytest.approx(part, abs=2e-3)


def test_states_carry_the_context_on(arpa) -> None:
    decoder, ngram = build_ctcdecoder(LABELS, arpa, alpha=1.0, beta=0.0), WordNgram(arpa)
    state = decoder.decode_beams(noise(8, 4))[0].last_lm_state
    for beam in decoder.decode_beams(noise(8, 5), lm_start_state=LmState(("a",))):
        if set(beam.text.split()) <= set(KNOWN):
            before = ngram.log_prob(["a"]) - (-0.3 - 1.0) * LN10  # without the end
            expected = ngram.log_prob(["a", *beam.text.split()]) - before
            assert beam.lm_score - beam.logit_score == pytest.approx(expected, abs=2e-3)
    assert isinstance(state, LmState)
    with pytest.raises(ValueError, match="lm_start_state"):
        decoder.decode(noise(4), lm_start_state=("a",))


def test_parameters_can_be_reset(arpa) -> None:
    decoder = build_ctcdecoder(LABELS, arpa)
    logits = noise(16, 6)
    decoder.reset_params(alpha=0.0, beta=0.0, unk_score_offset=0.0)
    bare = build_ctcdecoder(LABELS).decode_beams(logits)
    assert [b.text for b in decoder.decode_beams(logits)] == [b.text for b in bare]
    decoder.reset_params(alpha=1.0, lm_score_boundary=False)
    for beam in decoder.decode_beams(logits):
        expected = WordNgram(arpa).log_prob(beam.text.split(), boundary=False)
        assert beam.lm_score - beam.logit_score == pytest.approx(expected, abs=2e-3)
    with pytest.raises(ValueError, match="alpha"):
        decoder.reset_params(alpha=math.nan)
    assert decoder.model_container[decoder._model_key].alpha == 1.0


@pytest.mark.parametrize(
    "change, message",
    [({"alpha": -1.0}, "weight"), ({"beta": math.inf}, "beta"), ({"unk_score_offset": 1.0}, "at most 0"),
     ({"lm_score_boundary": 1}, "score_boundary"), ({"unigrams": "abc"}, "unigrams")],
)
def test_bad_parameters(arpa, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        build_ctcdecoder(LABELS, arpa, **change).decode(noise(3))


def test_a_truncated_n_gram_is_named(arpa) -> None:
    arpa.write_text(ARPA[:150])
    with pytest.raises(ValueError, match="words.arpa"):
        build_ctcdecoder(LABELS, arpa)
    with pytest.raises(FileNotFoundError, match="nothing.arpa"):
        build_ctcdecoder(LABELS, "nothing.arpa")


def test_unigrams_of_another_alphabet_are_warned_of(arpa, caplog) -> None:
    build_ctcdecoder(["", " ", "x", "y"], arpa)
    assert "different alphabets" in caplog.text


def test_an_llm_joins_beside_the_n_gram_or_alone(arpa, tmp_path) -> None:
    path = language_model(tmp_path / "llm", 3, pieces=False)
    lm, logits = CausalLm.from_pretrained(path), noise(14, 7)
    ngram = WordNgram(arpa)
    both = build_ctcdecoder(LABELS, arpa, alpha=0.6, beta=0.4, llm=lm, llm_weight=0.3)
    alone = build_ctcdecoder(LABELS, beta=0.2, llm=str(path), llm_weight=0.3)
    for beam in both.decode_beams(logits, beam_width=12):
        part = lm_part(ngram, beam.text, 0.6, 0.4, -10.0) + 0.3 * lm.log_prob(beam.text, eos=True)
        assert beam.lm_score - beam.logit_score == pytest.approx(part, abs=5e-3)
    for beam in alone.decode_beams(logits, beam_width=12):
        part = 0.2 * len(beam.text.split()) + 0.3 * lm.log_prob(beam.text, eos=True)
        assert beam.lm_score - beam.logit_score == pytest.approx(part, abs=5e-3)
    with pytest.raises(ValueError, match="llm must be given by its path"):
        both.save_to_dir(str(tmp_path / "both"))
    alone.save_to_dir(str(tmp_path / "alone"))
    loaded = BeamSearchDecoderCTC.load_from_dir(str(tmp_path / "alone"))
    assert loaded.decode_beams(logits) == alone.decode_beams(logits)


def test_a_saved_decoder_is_the_same(arpa, tmp_path) -> None:
    folder = tmp_path / "saved"
    decoder = build_ctcdecoder(LABELS, arpa, unigrams=["cab", "ab"], alpha=0.7, beta=0.1)
    decoder.save_to_dir(str(folder))
    written = sorted(path.name for path in (folder / "language_model").iterdir())
    assert written == ["attrs.json", "unigrams.txt", "words.arpa"]
    attributes = json.loads((folder / "language_model" / "attrs.json").read_text())
    assert attributes == {"alpha": 0.7, "beta": 0.1, "unk_score_offset": -10.0, "score_boundary": True}
    assert (folder / "language_model" / "unigrams.txt").read_text() == "ab\ncab\n"
    loaded = BeamSearchDecoderCTC.load_from_dir(str(folder), "utf-8")
    assert loaded.decode_beams(noise(12)) == decoder.decode_beams(noise(12))
    loaded.save_to_dir(str(folder))  # over itself
    (folder / "language_model" / "attrs.json").write_text('{"alpha": 1}')
    with pytest.raises(ValueError, match="have the fields"):
        BeamSearchDecoderCTC.load_from_dir(str(folder))
    (folder / "language_model" / "attrs.json").unlink()
    with pytest.raises(ValueError, match="hold attrs.json"):
        BeamSearchDecoderCTC.load_from_dir(str(folder))


@pytest.mark.skipif(importlib.util.find_spec("kenlm") is None, reason="transformers asks for kenlm")
def test_transformers_processor_is_loaded_with_its_language_model(arpa, tmp_path, monkeypatch) -> None:
    transformers = pytest.importorskip("transformers")
    for name in ("", ".alphabet", ".constants", ".decoder", ".language_model"):
        monkeypatch.setitem(sys.modules, "pyctcdecode" + name, sys)  # gone again after the test
    for name in ("", ".alphabet", ".constants", ".decoder", ".language_model"):
        sys.modules.pop("pyctcdecode" + name)
    compat.install()
    folder = tmp_path / "processor"
    letters = hugging_face_ctc(folder)
    tokenizer = transformers.Wav2Vec2CTCTokenizer.from_pretrained(folder)
    features = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)
    decoder = build_ctcdecoder(letters, arpa, alpha=0.9)
    transformers.Wav2Vec2ProcessorWithLM(features, tokenizer, decoder).save_pretrained(folder)
    processor = transformers.Wav2Vec2ProcessorWithLM.from_pretrained(folder, alpha=0.8)
    assert processor.language_model.alpha == 0.8 and processor.language_model.order == 2
    logits = np.random.default_rng(0).normal(0, 3, (30, len(letters))).astype(np.float32)
    decoder.reset_params(alpha=0.8)
    assert processor.decode(logits).text == decoder.decode(logits)
    assert processor.decode(logits, alpha=0.1).lm_score is not None
    assert processor.language_model.alpha == 0.1
