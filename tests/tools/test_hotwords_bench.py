"""The benchmark of hot words runs and tells figures.
Knows: tools/bench as modules, the shipped models. Must not know: what hot words are worth.
"""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from icefall_fusion.data import espeak

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"


@pytest.mark.skipif(not espeak.available(), reason="espeakng-loader is not installed")
def test_lists_of_hot_words_are_measured(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import hotwords

    output = tmp_path / "rows.json"
    given = ["--sentences", "8", "--sizes", "2,40", "--rounds", "1", "--speech", str(tmp_path / "speech")]
    hotwords.main([*given, "--boost", "12", "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert [row["phrases"] for row in rows] == [2] * 6 + [40] * 6
    of = {(row["method"], row["use"], row["phrases"]): row for row in rows}
    for method in ("ctc-prefix", "llm-delayed-shortest"):
        for size in (2, 40):
            bare, hot = of[method, "none", size], of[method, "search", size]
            assert hot["recall"] >= bare["recall"] and hot["ms"] > 0 and bare["names_spoken"] > 0
    assert of["llm-delayed-shortest", "prompt", 40]["nodes"] > 40


def test_names_are_words_that_only_have_capitals(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import hotwords

    from icefall_fusion.decode.utterances import Utterance

    cased = ("The old March met Barnaby. Nobody saw Dorothea!", "They march with “Josiah” and Dorothea’s")
    utterances = [Utterance(text, 1.0, None, lambda: None, {"cased": text}) for text in cased]
    assert hotwords.names_of(utterances) == ["barnaby", "dorothea", "dorothea's"]
    texts = {"a": "we saw barnaby here"}, {"a": "we saw barn here here"}
    found = hotwords.scores(*texts, ["barnaby"])
    assert found == {"wer": 50.0, "wer_else": 33.33, "recall": 0.0, "names_spoken": 1, "false": 0}
