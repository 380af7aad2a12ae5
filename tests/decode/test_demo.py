"""The demo on tiny models: sentences are spoken, half clean and half other, decoded, tabled and plotted.
Knows: icefall_fusion.decode.demo. Must not know: how speech is made or decoded.
"""
from __future__ import annotations

import json

import pytest
import tiny

from icefall_fusion.__main__ import main
from icefall_fusion.data.espeak import available
from icefall_fusion.decode.demo import STORIES, read_sentences
from icefall_fusion.decode.pretrained import with_pretrained

needs_espeak = pytest.mark.skipif(not available(), reason="eSpeak NG (espeakng-loader) is not installed")


def test_the_stories_are_long_enough() -> None:
    sentences = read_sentences(str(STORIES))
    assert len(sentences) >= 240 and sum(len(text.split()) for _, text in sentences) >= 3000
    assert len({story for story, _ in sentences}) >= 3


@needs_espeak
@pytest.mark.parametrize("workers", [1, 2])
def test_demo_leaves_results_and_plot(workers, tmp_path, capsys) -> None:
    tiny.everything(tmp_path / "models")
    stories = tmp_path / "stories.txt"
    stories.write_text("# One\n\nThe cat sat.\nA dog met a cat.\n# Two\nWe saw the sea.\nHe didn't speak.\n")
    methods = ["ctc-greedy", "llm-delayed-shortest"]
    arguments = ["--stories", str(stories), "--pretrained", str(tmp_path / "models")]
    arguments += ["--workers", str(workers), "--methods", ",".join(methods), "--out", str(tmp_path / "demo")]
    assert main(["demo", *arguments]) == 0
    rows = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert [(row["test_set"], row["method"]) for row in rows] == [
        (test_set, method) for test_set in ("clean", "other") for method in methods
    ]
    assert [row["words"] for row in rows] == [7, 7, 8, 8]
    assert (tmp_path / "demo" / "wer-vs-speed.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    first = shown.split("1 methods with an LLM follow")[0]
    assert "ctc-greedy" in first and "llm-delayed-shortest" not in first and "4 sentences" in shown


def test_without_models_the_demo_says_so(tmp_path, capsys) -> None:
    from icefall_fusion.decode.job import DecodeOptions

    stories = tmp_path / "stories.txt"
    stories.write_text("A sentence.\n")
    arguments = ["--stories", str(stories), "--pretrained", str(tmp_path), "--out", str(tmp_path / "demo")]
    assert main(["demo", *arguments]) == 2 and not (tmp_path / "demo").exists()
    with pytest.raises(FileNotFoundError, match="no pretrained model"):
        with_pretrained(DecodeOptions(out="out", test_sets={"dev": "x"}), tmp_path)
