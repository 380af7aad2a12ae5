"""tools/bench/context.py: sentences before the chosen ones, spoken, recognized, and read by the LLM.
Knows: the benchmark as a program, tiny models. Must not know: what context is worth.
"""
from __future__ import annotations

import gzip
import json
import runpy
import sys
from pathlib import Path

import pytest
import tiny

pytest.importorskip("espeakng_loader")
BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench" / "context.py"
WORDS = ("the cat sat", "a dog met", "we saw the sea", "she sold shells", "the old harbor")


def test_chosen_sentences_are_decoded_with_the_text_before_them(tmp_path: Path, monkeypatch) -> None:
    text = tmp_path / "data" / "text"
    text.mkdir(parents=True)
    rows = [{"id": f"{book}-{index}", "book": book, "index": index, "text": words, "cased": words.title()}
            for book in ("one", "two") for index, words in enumerate(WORDS)]
    chosen = [row for row in rows if row["index"] in (0, 2, 4)]  # nothing is before 0, and but 2 before 2
    for name, some in (("test", rows), ("selected_test-clean", chosen)):
        (text / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    acoustic = tiny.acoustic_model(tmp_path / "ctc_aed")
    llm = tiny.language_model(tmp_path / "llm", 3, pieces=False)
    output, speech = tmp_path / "context.json", tmp_path / "speech"
    monkeypatch.setattr(sys, "argv", [
        str(BENCH), "--data", str(tmp_path / "data"), "--before", "1", "3", "--emissions", str(acoustic),
        "--llm", str(llm), "--speech", str(speech), "--output", str(output),
        "--method", "llm-delayed-shortest",
    ])
    runpy.run_path(str(BENCH), run_name="__main__")
    found = json.loads(output.read_text())["rows"]
    assert [(row["context"], row["sentences"]) for row in found] == [
        ("none", 0), ("reference", 1), ("reference", 3), ("recognized", 1), ("recognized", 3)]
    assert {row["words"] for row in found} == {6}
    [manifest] = speech.glob("*/manifests/test-clean-chosen.jsonl.gz")
    cuts = [json.loads(line) for line in gzip.decompress(manifest.read_bytes()).splitlines()]
    for cut in cuts:
        custom = cut["supervisions"][0]["custom"]
        assert cut["id"].endswith("-4")
        assert custom["reference_3"] == "a dog met we saw the sea she sold shells"
        assert custom["reference_1"] == "she sold shells"
        assert custom["recognized_3"].endswith(custom["recognized_1"])
    assert found[2]["lm_tokens_forwarded"] > found[1]["lm_tokens_forwarded"] > found[0]["lm_tokens_forwarded"]
