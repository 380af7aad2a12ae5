"""The benchmarks of words run and tell figures.
Knows: tools/bench as modules, the shipped models. Must not know: how exact they are.
"""
from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from icefall_fusion.data import espeak

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"


pytestmark = pytest.mark.skipif(not espeak.available(), reason="espeakng-loader is not installed")


def measured(name: str, method: str, tmp_path: Path, monkeypatch) -> tuple[Any, list[dict[str, Any]]]:
    """Return a benchmark as a module, and its rows for some sentences."""
    monkeypatch.syspath_prepend(str(BENCH))
    bench, output = importlib.import_module(name), tmp_path / "rows.json"
    given = ["--sentences", "6", "--method", method, "--speech", str(tmp_path / "speech")]
    bench.main([*given, "--json", str(output)])
    return bench, json.loads(output.read_text())["rows"]


def test_times_of_words_are_measured(tmp_path, monkeypatch) -> None:
    word_times, rows = measured("word_times", "ctc-greedy", tmp_path, monkeypatch)
    assert {row["set"] for row in rows} == set(word_times.SPLITS) and len(rows) == 18
    of = {(row["set"], row["marks"], row["times"]): row for row in rows}
    for split in word_times.SPLITS:
        assert of[split, "search", "usual"]["end_mean_ms"] < of[split, "search", "marks"]["end_mean_ms"]
        assert of[split, "viterbi", "marks"]["right"] == of[split, "search", "marks"]["right"] > 10


def test_confidence_of_words_is_measured(tmp_path, monkeypatch) -> None:
    _, rows = measured("word_confidence", "ctc-prefix", tmp_path, monkeypatch)
    assert len(rows) == 5 * 4 and {row["set"] for row in rows} >= {"dev", "test-clean", "all tests"}
    assert all(0 <= row["ece_%"] <= 100 and 0 <= row["auc"] <= 1 and row["words"] > 30 for row in rows)
    [own] = [row for row in rows if row["confidence"] == "ctc-prefix" and row["set"] == "dev"]
    assert own["auc"] > 0.75
