"""The job train-word-ngram: an ARPA file by lmplz; what is refused.
Knows: the job. Must not know: graphs, k2.
"""
from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from icefall_fusion.__main__ import main
from icefall_fusion.ngram.piece_ngram import PieceNgram
from icefall_fusion.train.word_ngram import TrainWordNgramOptions

LMPLZ = Path(__file__).resolve().parents[2] / ".cache" / "lmplz" / "build" / "bin" / "lmplz"
LINES = ["the cat sat on the mat", "a dog met the cat", "the sea at dawn", "a rare word"] * 3


@pytest.fixture()
def text(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    return path


@pytest.mark.skipif(not LMPLZ.is_file(), reason="bash tools/build_lmplz.sh has not built lmplz")
def test_lmplz_writes_an_ngram_that_sums_to_one(text, tmp_path, capsys) -> None:
    out = tmp_path / "words.arpa.gz"
    code = main([
        "train-word-ngram", "--text", str(text), "--out", str(out), "--lmplz", str(LMPLZ), "--order", "2",
        "--prune", "[0]", "--min_count", "3", "--discount_fallback", "true", "--memory", "100M",
    ])
    assert code == 0
    words = sorted({word for line in LINES for word in line.split()})
    assert f"{len(words)} words, ngram 1={len(words) + 3}, ngram 2=" in capsys.readouterr().out
    ngram = PieceNgram.load(out, words)
    the = torch.full((len(words),), words.index("the"))
    scores = ngram.score([the], torch.arange(len(words)))
    end = ngram.score([the[:1]], torch.tensor([ngram.end_id]))
    total = float(scores.exp().sum() + end.exp().sum())
    assert 0.8 < total < 1.0 + 1e-4  # the rest is <unk>'s
    assert float(scores.max()) == float(scores[words.index("cat")]) > math.log(0.2)


def test_without_lmplz_the_remedy_is_told(text, tmp_path, capsys) -> None:
    job = ["train-word-ngram", "--text", str(text), "--out", str(tmp_path / "x")]
    assert main([*job, "--lmplz", "no-such"]) == 2
    assert "there is no program no-such: bash tools/build_lmplz.sh" in capsys.readouterr().err


@pytest.mark.skipif(not LMPLZ.is_file(), reason="bash tools/build_lmplz.sh has not built lmplz")
def test_what_lmplz_or_the_text_cannot_give_is_told(text, tmp_path, capsys) -> None:
    job = ["train-word-ngram", "--out", str(tmp_path / "x.arpa"), "--lmplz", str(LMPLZ), "--memory", "100M"]
    assert main([*job, "--text", str(text), "--min_count", "1"]) == 2
    assert "lmplz must accept the text" in capsys.readouterr().err  # too little for its discounts
    assert not (tmp_path / "x.arpa").exists()
    assert main([*job, "--text", str(text), "--min_count", "99"]) == 2
    assert "must have a word with a count of at least 99" in capsys.readouterr().err
    assert main([*job, "--text", str(tmp_path / "none.jsonl")]) == 2
    assert "there is no text at" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text("no json\n")
    assert main([*job, "--text", str(tmp_path / "bad.jsonl")]) == 2
    assert "bad.jsonl line 1 must be JSON with a text" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"order": 0}, {"min_count": 0}, {"prune": (3, 1)}, {"prune": (0,) * 4}])
def test_options_are_checked(wrong) -> None:
    with pytest.raises(ValueError, match=f"TrainWordNgramOptions.{next(iter(wrong))} must"):
        TrainWordNgramOptions("text", "out", **wrong)
