"""The benchmark against sherpa-onnx: both sides decode the same files and say the same, the rows are whole.
Knows: tools/bench as modules, a tiny transducer. Must not know: times.
"""
from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.acoustic.test_transducer_sources import ours

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"


def test_both_sides_decode_the_same_files(tmp_path) -> None:
    for package in ("sherpa_onnx", "onnx", "onnxruntime"):
        pytest.importorskip(package)
    bench, audio = runpy.run_path(str(BENCH / "transducer.py")), []
    for seed in range(3):
        audio.append(str(tmp_path / f"{seed}.wav"))
        soundfile.write(audio[-1], np.random.default_rng(seed).normal(0, 0.1, 24_000), 16_000)
    args = ["--model", str(ours(tmp_path)), "--audio", *audio, "--rounds", "1", "--beams", "1", "3"]
    rows = bench["measure"](bench["arguments"](args))
    assert [row["beam"] for row in rows] == [1, 3]
    for row in rows:
        assert row["utterances"] == 3 and row["audio_seconds"] == pytest.approx(4.5)
        assert row["words"] > 0 and min(row["ours"], row["theirs"], row["ours_encoder"]) > 0
        assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"]) and "wer_ours" not in row
    assert rows[0]["same_texts"] == 3 and rows[0]["different_words"] == 0  # greedy on both sides
    assert bench["table"](rows).count("\n") == 3
