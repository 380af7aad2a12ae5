"""The benchmark of other decoders' calls: rows of both sides, texts that language models make better.
Knows: tools/bench as modules. Must not know: times.
"""
from __future__ import annotations

import runpy
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"


def test_both_sides_decode_the_same_calls_and_words_help() -> None:
    bench = runpy.run_path(str(BENCH / "compat.py"))
    args = ["--utterances", "6", "--words", "6", "--rounds", "1", "--beam", "20", "--blur", "2.4"]
    rows = bench["measure"](bench["arguments"](args))
    ours = {row["call"]: row for row in rows if row["side"] == "ours"}
    assert len(ours) == 7 and all(row["ms_a_second"] > 0 for row in rows)
    assert ours["decode"]["wer"] == ours["decode_batch"]["wer"] > 0
    assert ours["decode_batch, word n-gram"]["wer"] < ours["decode_batch"]["wer"]
    assert ours["ctc_decoder, lexicon"]["wer"] < ours["ctc_decoder"]["wer"]
    for row in rows:
        assert row["call"] in ours and row["side"] in ("ours", "theirs")
    assert bench["table"](rows).count("\n") == 8
