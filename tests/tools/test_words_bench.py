"""The benchmarks of words run and tell figures.
Knows: tools/bench as modules, the shipped models. Must not know: how exact they are.
"""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from icefall_fusion.data import espeak

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"


@pytest.mark.skipif(not espeak.available(), reason="espeakng-loader is not installed")
def test_times_of_words_are_measured(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import word_times

    output = tmp_path / "rows.json"
    given = ["--sentences", "6", "--method", "ctc-greedy", "--speech", str(tmp_path / "speech")]
    word_times.main([*given, "--json", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert {row["set"] for row in rows} == set(word_times.SPLITS) and len(rows) == 18
    of = {(row["set"], row["marks"], row["times"]): row for row in rows}
    for split in word_times.SPLITS:
        assert of[split, "search", "usual"]["end_mean_ms"] < of[split, "search", "marks"]["end_mean_ms"]
        assert of[split, "viterbi", "marks"]["right"] == of[split, "search", "marks"]["right"] > 10
