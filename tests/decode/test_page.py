"""The Python example on the page of decoding runs as it stands, with the shipped models.
Knows: icefall_fusion/decode/README.md. Must not know: how decoding works.
"""
from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import soundfile

PAGE = Path(__file__).resolve().parents[2] / "icefall_fusion" / "decode" / "README.md"


def test_the_example_runs(tmp_path, monkeypatch, capsys) -> None:
    [example] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(1).normal(0, 0.1, 24_000)
    soundfile.write("talk.flac", noise, 16_000)
    exec(example, {})
    assert capsys.readouterr().out.startswith("talk.flac ")
    Path("talk.flac").write_bytes(b"")
    exec(example, {})
    assert capsys.readouterr().out.startswith("skipped talk.flac ")
