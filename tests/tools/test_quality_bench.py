"""tools/bench/quality.py and learning_curve.py as programs: tables, figures, going on.
Knows: the benchmarks, tiny models. Must not know: what a better model buys.
"""
from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import tiny
import torch

from icefall_fusion.lm import CausalLm

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(BENCH / f"{name}.py"), run_name="__main__")


def test_pairs_of_models_are_tuned_and_decoded_and_kept(tmp_path: Path, monkeypatch, capsys) -> None:
    made = tiny.everything(tmp_path / "models")
    out, output, picture = tmp_path / "out", tmp_path / "quality.json", tmp_path / "quality.png"
    call = ["quality", "--acoustic", f"tiny={made['model']}", "--dev", made["cuts"], "--tests",
            f"noise={made['cuts']}", "--lm", "none=", f"3-gram={made['ngram']}", f"llm={made['llm']}",
            "--dtype", "float32", "--tune", 3, "--limit", 5, "--out", out, "--output", output,
            "--picture", picture]
    run(monkeypatch, *call)
    rows = json.loads(output.read_text())["rows"]
    assert [(row["lm"], row["method"]) for row in rows] == [
        ("none", "ctc-prefix"), ("3-gram", "ngram-shallow"), ("llm", "llm-delayed-shortest")]
    assert rows[0]["perplexity"] is None and rows[0]["weights"] == {}
    assert set(rows[2]["weights"]) == {"llm", "words"} and rows[2]["lm_seconds"]["noise"] > 0
    texts = [tiny.LINES[index % 4] for index in range(7)]
    words = sum(len(text.split()) + 1 for text in texts)
    lm = CausalLm.from_pretrained(made["llm"], dtype=torch.float32)
    expected = math.exp(-sum(lm.log_prob(text, eos=True) for text in texts) / words)
    assert rows[2]["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert 1 < rows[1]["perplexity"] < 1e6 and picture.stat().st_size > 5000
    weights = (out / "tiny" / "llm" / "weights.yaml").read_bytes()
    output.unlink()
    run(monkeypatch, *call)  # all is there
    again = json.loads(output.read_text())["rows"]
    assert [row["wer"] for row in again] == [row["wer"] for row in rows]
    assert (out / "tiny" / "llm" / "weights.yaml").read_bytes() == weights


def test_a_learning_curve_counts_hours_by_tokens(tmp_path: Path, monkeypatch, capsys) -> None:
    acoustic = tiny.acoustic_model(tmp_path / "ctc_aed")
    cuts = tiny.manifest(tmp_path / "audio", 4)
    from icefall_fusion.text.tokens import AcousticTokens

    tokens = AcousticTokens.load(acoustic)
    once = sum(len(tokens.encode(line)) + 1 for line in tiny.LINES[:4])
    log = tmp_path / "log.jsonl"
    lines = [{"step": step, "items": once * step, "valid_loss": 2.0 / step, "valid_greedy_wer": 90.0 / step}
             for step in (1, 2, 36000)]
    log.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 3, "items": 5}]))
    output, picture = tmp_path / "curve.json", tmp_path / "curve.png"
    run(monkeypatch, "learning_curve", "--logs", f"first={log}", "--manifest", cuts, "--tokens", acoustic,
        "--picture", picture, "--output", output, "--before", 2)
    [rows] = json.loads(output.read_text())["curves"].values()
    seconds = sum((9000 + 2500 * index) / 16000 for index in range(4))
    assert [row["hours"] for row in rows] == pytest.approx([2.0, 2.0, 2 + seconds * 10], abs=0.06)
    assert [row["wer"] for row in rows] == [90.0, 45.0, 0.0] and picture.stat().st_size > 5000
