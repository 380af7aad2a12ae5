"""The demo's own test text: enough sentences and words, each sayable, none twice.
Knows: tools/demo/stories.txt. Must not know: audio, models.
"""
from __future__ import annotations

from pathlib import Path

from icefall_fusion.data.selection import is_speakable
from icefall_fusion.text.normalizer import normalize

STORIES = Path(__file__).parents[2] / "tools" / "demo" / "stories.txt"


def test_demo_text_is_long_varied_and_sayable() -> None:
    lines = [line for line in STORIES.read_text(encoding="utf-8").splitlines() if line]
    titles = [line for line in lines if line.startswith("# ")]
    sentences = [line for line in lines if not line.startswith("#")]
    spoken = [normalize(sentence) for sentence in sentences]
    counts = [len(text.split()) for text in spoken]
    assert 4 <= len(titles) == len(set(titles))
    assert len(spoken) >= 240 and sum(counts) >= 3000
    assert len(set(spoken)) == len(spoken)
    assert 5 <= min(counts) and max(counts) <= 30
    assert all(2.0 <= len(text) / 14.5 <= 15.0 for text in spoken)  # seconds, about
    assert all(is_speakable(sentence) for sentence in sentences)
