"""The calls of pyctcdecode: texts, scores and frames against sums over all alignments; labels; bad input.
Knows: small alphabets, random logits. Must not know: pyctcdecode itself, which need not be installed.
"""
from __future__ import annotations

import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch

from icefall_fusion.compat import pyctcdecode as compat
from icefall_fusion.compat.alphabet import Alphabet
from icefall_fusion.compat.pyctcdecode import BeamSearchDecoderCTC, build_ctcdecoder
from tests.tiny import hugging_face_ctc

LABELS = [" ", "a", "b", "c", ""]
WIDE = {"beam_width": 4000, "beam_prune_logp": -math.inf, "token_min_logp": -math.inf}


def spoken(labels: list[str], path: list[int], sharpness: float = 9.0) -> np.ndarray:
    """Return logits [T, V] of an alignment."""
    logits = np.zeros((len(path), len(labels)), np.float32)
    logits[np.arange(len(path)), path] = sharpness
    return logits


def noise(frames: int, seed: int = 0, pieces: int = len(LABELS)) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (frames, pieces)).astype(np.float32)


def text_of(path: tuple[int, ...], labels: list[str]) -> str:
    kept = [v for i, v in enumerate(path) if i == 0 or v != path[i - 1]]
    return " ".join("".join(labels[v] for v in kept).split())


def test_each_text_has_the_sum_over_all_its_alignments() -> None:
    logits = noise(5)
    log_probs = torch.from_numpy(logits).double().log_softmax(1).numpy()
    masses: dict[str, float] = {}
    for path in itertools.product(range(len(LABELS)), repeat=5):
        text = text_of(path, LABELS)
        masses[text] = masses.get(text, 0.0) + math.exp(sum(log_probs[t, v] for t, v in enumerate(path)))
    beams = build_ctcdecoder(LABELS).decode_beams(logits, **WIDE)
    assert len(beams) == len(masses)
    for beam in beams:
        assert beam.logit_score == pytest.approx(math.log(masses[beam.text]), abs=1e-4)
        assert beam.lm_score == beam.logit_score and beam.last_lm_state is None
    assert [beam.lm_score for beam in beams] == sorted((beam.lm_score for beam in beams), reverse=True)


def test_text_and_frames_of_words() -> None:
    #        a  a  -  b  space  -  c  c  -
    logits = spoken(LABELS, [1, 1, 4, 2, 0, 4, 3, 3, 4])
    decoder = build_ctcdecoder(LABELS)
    assert decoder.decode(logits) == "ab c"
    text, state, frames, logit_score, lm_score = decoder.decode_beams(logits)[0]
    assert (text, state) == ("ab c", None) and logit_score == lm_score
    words = [word for word, _ in frames]
    assert words == ["ab", "c"] and all(isinstance(frame, int) for _, span in frames for frame in span)
    assert frames[0][1] == (0, 4) and frames[1][1][0] == 6


def test_logits_log_probs_probabilities_and_tensors_are_the_same() -> None:
    logits, decoder = noise(20), build_ctcdecoder(LABELS)
    log_probs = torch.from_numpy(logits).log_softmax(1)
    expected = decoder.decode_beams(logits, beam_width=10)
    for values in (log_probs.numpy(), log_probs.exp().numpy(), torch.from_numpy(logits)):
        found = decoder.decode_beams(values, beam_width=10)
        assert [beam.text for beam in found] == [beam.text for beam in expected]
        assert found[0].logit_score == pytest.approx(expected[0].logit_score, abs=1e-3)


def test_a_batch_is_its_utterances_and_needs_no_pool() -> None:
    decoder, batch = build_ctcdecoder(LABELS), [noise(frames, frames) for frames in (12, 30, 0, 7)]
    assert decoder.decode_batch(None, batch) == [decoder.decode(logits) for logits in batch]
    for beams, logits in zip(decoder.decode_beams_batch(object(), batch, beam_width=8), batch):
        single = decoder.decode_beams(logits, beam_width=8)
        assert [(b[0], b[1]) for b in beams] == [(b[0], b[2]) for b in single]
        assert [b.lm_score for b in beams] == pytest.approx([b.lm_score for b in single], abs=1e-4)


def test_thresholds_drop_labels_and_hypotheses() -> None:
    logits, decoder = noise(12), build_ctcdecoder(LABELS)
    greedy = decoder.decode_beams(logits, token_min_logp=0.0)
    assert [beam.text for beam in greedy] == [text_of(tuple(logits.argmax(1)), LABELS)]
    best, *others = decoder.decode_beams(logits, beam_prune_logp=-2.0)
    assert others and all(beam.lm_score >= best.lm_score - 2 for beam in others)
    assert len(decoder.decode_beams(logits)) > len(others) + 1


@pytest.mark.parametrize(
    "labels, text",
    [
        (["<pad>", "|", "H", "I", "<unk>"], "HI HI"),
        (["_", " ", "H", "I"], "HI HI"),
        (["[PAD]", "▁HI", "▁H", "I"], "HI HI"),
        (["[PAD]", "HI", "##I", "H"], "HI HI"),
    ],
)
def test_labels_of_all_styles(labels, text) -> None:
    spell = {"<pad>": [2, 3, 1, 2, 3], "_": [2, 3, 1, 2, 3], "[PAD]": [1, 0, 1]}[labels[0]]
    assert build_ctcdecoder(labels).decode(spoken(labels, spell)) == text


@pytest.mark.parametrize("path,text", [
    ([0, 1, 2, 3], "你好 a"), ([0, 2, 1, 2, 3], "你 好 a"), ([3, 0, 1], "a你好"),
])
def test_spaces_alone_part_words_of_any_script(path, text) -> None:
    labels = ["你", "好", " ", "a", ""]
    beam = build_ctcdecoder(labels).decode_beams(spoken(labels, path))[0]
    assert beam.text == text and [word for word, _ in beam.text_frames] == text.split()


def test_a_missing_blank_is_one_more_label() -> None:
    decoder = build_ctcdecoder([" ", "a"])
    assert decoder.decode(spoken([" ", "a", ""], [1, 2, 1, 0, 1])) == "aa a"


@pytest.mark.parametrize(
    "labels, message",
    [(["a", "a", ""], "differ.*'a'"), ("abc", "list of texts"), (["a", 1], "list of texts"),
     (["▁a", " ", ""], "no space"), (["<pad>", "[PAD]", "a"], "one blank")],
)
def test_bad_labels(labels, message) -> None:
    with pytest.raises(ValueError, match=message):
        build_ctcdecoder(labels)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": np.zeros((3, 4))}, "5 labels.*3, 4"),
        ({"logits": np.zeros((1, 3, 5))}, "2 dimensions"),
        ({"logits": np.full((3, 5), np.nan)}, "frame 0"),
        ({"logits": np.full((3, 5), -np.inf)}, "frame 0"),
        ({"logits": np.array([["a"] * 5])}, "hold numbers"),
        ({"beam_width": 0}, "beam_width.*at least 1"),
        ({"beam_prune_logp": 1.0}, "beam_prune_logp.*below 0"),
        ({"token_min_logp": math.nan}, "token_min_logp"),
        ({"lm_start_state": ()}, "lm_start_state"),
    ],
)
def test_bad_arguments(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        build_ctcdecoder(LABELS).decode_beams(**{"logits": noise(3), **change})


def test_equal_logits_and_no_frames_are_decoded() -> None:
    decoder = build_ctcdecoder(LABELS)
    assert isinstance(decoder.decode(np.zeros((9, 5))), str)
    assert decoder.decode_beams(np.zeros((0, 5)))[0][0] == ""


def test_a_saved_decoder_is_the_same(tmp_path) -> None:
    decoder = build_ctcdecoder(["<pad>", "|", "a", "b"])
    decoder.save_to_dir(str(tmp_path))
    written = json.loads((tmp_path / "alphabet.json").read_text())
    assert written == {"labels": ["", " ", "a", "b"], "is_bpe": False}
    loaded = BeamSearchDecoderCTC.load_from_dir(str(tmp_path))
    logits = noise(15, pieces=4)
    assert loaded.decode_beams(logits) == decoder.decode_beams(logits)
    (tmp_path / "alphabet.json").write_text('{"labels": ["a"]}')
    with pytest.raises(ValueError, match="labels and is_bpe"):
        BeamSearchDecoderCTC.load_from_dir(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="alphabet"):
        BeamSearchDecoderCTC.load_from_dir(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="must be JSON"):
        Alphabet.loads("no")


@pytest.fixture
def installed(monkeypatch):
    """Let packages import pyctcdecode and find ours."""
    for name in ("", ".alphabet", ".constants", ".decoder", ".language_model"):
        monkeypatch.delitem(sys.modules, "pyctcdecode" + name, raising=False)
    compat.install()
    yield
    for name in ("", ".alphabet", ".constants", ".decoder", ".language_model"):
        sys.modules.pop("pyctcdecode" + name, None)


def test_transformers_processor_decodes_a_tiny_wav2vec2(installed, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    letters = hugging_face_ctc(tmp_path)
    model = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path).eval()
    tokenizer = transformers.Wav2Vec2CTCTokenizer.from_pretrained(tmp_path)
    features = transformers.Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
    processor = transformers.Wav2Vec2ProcessorWithLM(features, tokenizer, build_ctcdecoder(letters))
    audio = [np.random.default_rng(seed).normal(0, 1, 9000 + 4000 * seed) for seed in (1, 2)]
    inputs = processor(audio, sampling_rate=16000, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**inputs).logits.numpy()
    single = processor.decode(logits[0], output_word_offsets=True, beam_width=20)
    assert single.text and single.lm_score == single.logit_score
    assert [offset["word"] for offset in single.word_offsets] == single.text.split()
    batch = processor.batch_decode(logits, num_processes=1, beam_width=20)
    assert batch.text[0] == single.text and len(batch.text) == 2
    best = processor.decode(logits[1], n_best=3)
    assert len(best.text) == 3 and best.text[0] == processor.decode(logits[1]).text


# --- hot words ----------------------------------------------------------------------------------------------


def test_each_word_of_hot_phrases_is_paid_once_a_time() -> None:
    decoder, logits = build_ctcdecoder(LABELS), noise(12, 5)
    for beam in decoder.decode_beams(logits, beam_width=30, hotwords=["ab c", "b"], hotword_weight=2.5):
        paid = 2.5 * sum(word in ("ab", "c", "b") for word in beam.text.split())
        assert beam.lm_score - beam.logit_score == pytest.approx(paid, abs=1e-3)
    plain = decoder.decode(logits)
    assert decoder.decode(logits, hotwords=[], hotword_weight=3.0) == plain
    assert "cb" in decoder.decode(logits, hotwords=["cb"], hotword_weight=40.0).split()
    assert decoder.decode_batch(None, [logits], hotwords=("cb",), hotword_weight=40.0) != [plain]


@pytest.mark.parametrize(
    "change, message",
    [({"hotwords": "ab"}, "list of texts"), ({"hotwords": [" "]}, "none empty"), ({"hotwords": [3]}, "texts"),
     ({"hotwords": ["xyz"]}, "xyz"), ({"hotwords": ["a"], "hotword_weight": math.nan}, "boost")],
)
def test_bad_hot_words(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        build_ctcdecoder(LABELS).decode(noise(4), **change)
