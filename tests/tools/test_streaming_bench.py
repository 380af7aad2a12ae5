"""The benchmark of streams: its clock, its figures by hand, and a run with the shipped models.
Knows: tools/bench as modules, the shipped models. Must not know: how fast or good streams are.
"""
from __future__ import annotations

import importlib
import json
import time
from pathlib import Path

import numpy as np
import pytest

from icefall_fusion.data import espeak
from icefall_fusion.nbest import WordTime

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Return modules of the folder by name."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def played_by(bench, truth, sights, seconds=3.0):
    """Return a talk as somebody saw it: (moment, words with starts, committed words, seconds heard)."""
    clock = bench("streaming_clock")
    words = [WordTime(word, start, end) for word, start, end in truth]
    talk = clock.Talk("talk", np.zeros(round(seconds * 16000), np.float32),
                      " ".join(word.word for word in words), words)
    played = clock.Played(talk)
    for at, shown, stable, heard in sights[:-1]:
        marks = tuple(WordTime(word, start, start + 0.1) for word, start in shown)
        played.see(clock.Sight(at, marks, stable), heard)
    at, shown, _, _ = sights[-1]
    played.end(at, [WordTime(word, start, start + 0.1) for word, start in shown])
    return played


TRUTH = [("the", 0.0, 0.2), ("cat sat", 0.2, 1.0), ("down", 1.0, 2.0)]
SIGHTS = [
    (0.5, [("the", 0.1)], 0, 0.4),
    (0.9, [("the", 0.1), ("ca", 0.3)], 0, 0.8),
    (1.3, [("a", 0.1), ("cat", 0.3), ("sat", 0.7)], 0, 1.2),
    (1.7, [("the", 0.1), ("cat", 0.3), ("sat", 0.7)], 2, 1.6),
    (2.1, [("the", 0.1), ("cat", 0.3), ("sat", 0.7)], 2, 2.0),
    (3.2, [("the", 0.1), ("cat", 0.3), ("sat", 0.7), ("dawn", 1.5)], 4, 3.0),
]


def test_latency_counts_from_the_end_of_words_that_are_right(bench) -> None:
    figures = bench("streaming_figures")
    played = played_by(bench, TRUTH, SIGHTS)
    # of "cat sat" only the end of "sat" is known; "dawn" is wrong
    assert np.array(list(figures.delays(played))) == pytest.approx(np.array([[0.3, 1.5], [0.3, 2.2]]))
    assert list(figures.heard_after(played)) == pytest.approx([0.3, 0.3, 0.1])
    found = figures.measures([played])
    assert (found["wer"], found["words"], found["measured"]) == (25.0, 4, 2)
    assert (found["first_p90_ms"], found["commit_p50_ms"], found["final_p99_ms"]) == (300, 1850, 200)


def test_words_elsewhere_in_time_are_others(bench) -> None:
    """A word that is shown early and far from where it ends up does not count as this word."""
    figures = bench("streaming_figures")
    sights = [(0.5, [("down", 0.1)], 0, 0.4), (2.4, [("down", 1.2)], 0, 2.2), (3.0, [("down", 1.2)], 1, 3.0)]
    played = played_by(bench, [("down", 1.0, 2.0)], sights)
    assert list(figures.delays(played))[0] == pytest.approx((0.4, 1.0))


def test_words_that_only_grow_are_stable(bench) -> None:
    figures = bench("streaming_figures")
    # "the" gives way to "a" and comes back; "ca" grows
    assert figures.changes(played_by(bench, TRUTH, SIGHTS)) == (1 + 1 + 2 + 1 + 1, 2, 5, 2)
    silent = played_by(bench, TRUTH, [(1.0, [], 0, 0.9), (3.0, [], 0, 3.0)])
    assert figures.changes(silent) == (0, 0, 0, 0)
    inserted = [(1.0, [("b", 0.5), ("c", 0.7)], 0, 0.9), (2.0, [("a", 0.1), ("b", 0.5), ("c", 0.7)], 0, 2.0)]
    assert figures.changes(played_by(bench, TRUTH, inserted)) == (3, 0, 2, 0)


def test_the_virtual_clock_adds_computing_to_arrivals(bench) -> None:
    clock = bench("streaming_clock").Clock(wall=False)
    clock.wait_until(100.0)
    with clock.computing():
        time.sleep(0.05)  # another process's time
    assert 100.0 <= clock.now < 100.04
    with clock.computing():
        begun = time.process_time()
        while time.process_time() < begun + 0.05:
            pass
    assert clock.now == pytest.approx(100.0 + clock.busy) and clock.busy >= 0.05
    clock.wait_until(50.0)
    assert clock.now >= 100.05
    wall, begun = bench("streaming_clock").Clock(wall=True), time.perf_counter()
    wall.wait_until(0.05)
    assert time.perf_counter() - begun >= 0.045 and wall.now >= 0.05


def test_aims_are_met_or_missed(bench) -> None:
    figures = bench("streaming_figures")
    row = {"wer": 10.0, "first_p90_ms": 500.0, "instability": 0.1, "chunk_ms": 640}
    rows = [
        {"kind": "whole", "method": "ctc-prefix", "wer": 10.0, "chunk_ms": None},
        {"kind": "whole", "method": "llm-delayed-shortest", "wer": 8.0, "chunk_ms": None},
        {"kind": "stream", "method": "ctc-prefix", **row},
        {"kind": "stream", "method": "llm-delayed-shortest", **row, "first_p90_ms": 700.0, "wer": 8.6},
        {"kind": "capacity", "method": "llm-delayed-shortest", "streams": 9, "chunk_ms": 320},
    ]
    assert [one["met"] for one in figures.aims(rows)] == [True, False, True, False, True, False]
    lines = figures.page([{**row, "heard_p99_ms": 1} for row in rows])
    assert sum("| missed |" in line for line in lines) == 3 and any("| whole |" in line for line in lines)


def test_the_page_of_results_has_a_place_for_them(bench) -> None:
    text = (BENCH.parents[1] / "egs" / "minibooks" / "ASR" / "RESULTS.md").read_text(encoding="utf-8")
    lines = bench("streaming_figures").page([{
        "kind": "stream", "method": "ctc-prefix", "chunk_ms": 640, "wer": 1.0, "first_p90_ms": None,
    }])
    begin, end = bench("streaming").MARKS
    filled = bench("gpu_page").put(text, begin, end, lines)
    assert "| ctc-prefix | 640 | 1.00 |" in filled
    assert filled.startswith(text[: text.index(begin)]) and filled.endswith(text[text.index(end) :])


@pytest.mark.skipif(not espeak.available(), reason="espeakng-loader is not installed")
def test_streams_are_measured(tmp_path, bench, capsys) -> None:
    streaming, output = bench("streaming"), tmp_path / "rows.json"
    page = tmp_path / "page.md"
    page.write_text("before\n" + "\n".join(streaming.MARKS) + "\nafter\n")
    given = ["--sentences", "4", "--speech", str(tmp_path / "speech"), "--output", str(output), "--methods",
             "ctc-prefix", "llm-nbest-rescoring", "llm-delayed-shortest", "--capacity", "1",
             "--most-streams", "2", "--page", str(page), "--figure", str(tmp_path / "plot.png")]
    streaming.main([*given, "--chunks", "640"])
    rows = json.loads(output.read_text())["rows"]
    assert [row["kind"] for row in rows] == ["whole"] * 3 + ["stream"] * 3 + ["capacity"] * 2
    of = {(row["kind"], row["method"]): row for row in rows}
    for row in rows[3:6]:
        assert row["measured"] > 10 and row["rtf"] > 0 and row["heard_p50_ms"] < row["commit_p90_ms"]
        assert of["whole", row["method"]]["first_p50_ms"] > 1000 > row["first_p50_ms"]
    assert of["stream", "llm-delayed-shortest"]["lm_forwards"] > 10
    assert of["stream", "llm-delayed-shortest"]["kv_bytes"] > 0
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    shown = page.read_text()
    assert shown.startswith("before") and shown.endswith("after\n") and "| ctc-prefix | 640 |" in shown
    capsys.readouterr()
    streaming.main([*given, "--chunks", "640", "1280"])  # goes on: three rows are new
    assert json.loads(output.read_text())["rows"][:8] == rows
    assert capsys.readouterr().out.count("kind ") == 3


@pytest.mark.skipif(not espeak.available(), reason="espeakng-loader is not installed")
def test_a_neural_model_at_every_step_and_late_scores_beside_look_ahead_are_measured(tmp_path, bench) -> None:
    output = tmp_path / "rows.json"
    given = ["--sentences", "2", "--speech", str(tmp_path / "speech"), "--output", str(output)]
    methods = ["nlm-shallow", "llm-delayed-shortest-late-4-ahead"]
    bench("streaming").main([*given, "--chunks", "640", "--capacity", "0", "--methods", *methods])
    rows = {(row["kind"], row["method"]): row for row in json.loads(output.read_text())["rows"]}
    assert all(rows["stream", method]["words"] > 0 for method in methods)
    assert rows["stream", "llm-delayed-shortest-late-4-ahead"]["lm_tokens_forwarded"] > 0


@pytest.mark.skipif(not espeak.available(), reason="espeakng-loader is not installed")
@pytest.mark.parametrize("method", ["attention-rescoring", "ngram-nbest-rescoring"])
def test_what_streams_do_not_serve_is_refused_at_once(tmp_path, bench, method) -> None:
    output = tmp_path / "rows.json"
    given = ["--sentences", "2", "--speech", str(tmp_path / "speech"), "--output", str(output)]
    with pytest.raises(ValueError, match="then N-best rescoring by an LM at most"):
        bench("streaming").main([*given, "--methods", "ctc-greedy", method])
    assert not output.exists()


@pytest.mark.skipif(not espeak.available(), reason="espeakng-loader is not installed")
def test_a_random_llm_of_a_size_does_its_work_and_changes_no_word(tmp_path, bench) -> None:
    output = tmp_path / "rows.json"
    given = ["--sentences", "2", "--speech", str(tmp_path / "speech"), "--output", str(output)]
    asked = ["--shape", "tiny", "--kinds", "stream", "--chunks", "640"]
    bench("streaming").main([*given, *asked, "--methods", "ctc-prefix", "llm-delayed-shortest"])
    rows = json.loads(output.read_text())["rows"]
    assert [row["kind"] for row in rows] == ["stream"] * 2
    assert rows[1]["lm_forwards"] > 5 and rows[1]["wer"] == rows[0]["wer"]
    with pytest.raises(SystemExit):
        bench("streaming").main([*given, "--kinds", "streams"])


@pytest.mark.skipif(not espeak.available(), reason="espeakng-loader is not installed")
def test_the_memory_of_a_long_stream_is_measured(tmp_path, bench) -> None:
    output = tmp_path / "rows.json"
    given = ["--sentences", "4", "--speech", str(tmp_path / "speech"), "--output", str(output)]
    bench("streaming").main([*given, "--methods", "llm-delayed-shortest", "--minutes", "0.8"])
    rows = json.loads(output.read_text())["rows"]
    assert [row["minutes"] for row in rows] == [round((n + 1) * 2 / 60, 2) for n in range(24)] * 2
    one, several = rows[23], rows[47]
    assert one["segments"] == 1 < several["segments"] and one["words"] > 50 and several["words"] > 50
    memory = bench("streaming_memory")
    line = [{"minutes": 60.0 * n, "rss_mb": 100.0 + 3 * max(n, 2)} for n in range(9)]
    assert memory.growth(line) == pytest.approx(3.0)
