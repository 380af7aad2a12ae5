"""Recorded events: what is written is read, files that are none are refused, a floor is what it says.
Knows: tools/bench/llm_events.py and llm_tree.py as programs. Must not know: times.

What times a GPU here has never run on one.
"""
from __future__ import annotations

import gzip
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")
from icefall_fusion.lm import CausalLm  # noqa: E402
from icefall_fusion.lm.loading import Vocabulary  # noqa: E402
from icefall_fusion.lm.tree_scorer import TreeOptions  # noqa: E402

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"
EVENTS = runpy.run_path(str(BENCH / "llm_events.py"))
paths = st.lists(st.lists(st.integers(0, 9), max_size=5).map(tuple), max_size=6)


@given(st.lists(st.tuples(paths, st.booleans(), st.none() | paths), max_size=4), st.booleans())
def test_what_is_written_is_read(tmp_path_factory, script, small) -> None:
    events = [
        EVENTS["Event"]([0] * len(found), found, ends, None if kept is None else ([1] * len(kept), kept))
        for found, ends, kept in script
    ]
    recording = EVENTS["Recording"]([(2, events), (1, [])], 12.5, {"beam": 10})
    file = str(tmp_path_factory.mktemp("events") / ("events.json.gz" if small else "events.json"))
    EVENTS["write_events"](file, recording)
    assert EVENTS["read_events"](file) == recording
    first = Path(file).read_bytes()
    EVENTS["write_events"](file, recording)
    assert Path(file).read_bytes() == first


@pytest.mark.parametrize("name, data", [
    ("a.json", b"{}"), ("a.json", b"[1]"), ("a.json.gz", b"none"), ("a.json", b"none"),
    ("a.json.gz", gzip.compress(b"{}", mtime=0)[:-6]),
    ("a.json.gz", gzip.compress(b"{}" * 99, mtime=0)[:20] + b"\xff" * 20),
])
def test_a_file_that_is_no_recording_is_refused(tmp_path, name, data) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match="--events must be a file of --record"):
        EVENTS["read_events"](str(tmp_path / name))


def tiny(**more) -> CausalLm:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        **more,
    )
    return CausalLm(transformers.LlamaForCausalLM(config), Vocabulary(None, None, 1, 2), "tiny", False)


def test_a_recording_tree_scores_like_others_and_notes_what_it_is_asked() -> None:
    lm = tiny()
    kinds = (EVENTS["RecordingScorer"], type(lm.open_tree(1)))
    scorers = [kind(lm, [[1], [1]], TreeOptions()) for kind in kinds]
    scorers[0].events = []
    found = []
    for scorer in scorers:
        nodes = [scorer.insert(scorer.root(b), path) for b, path in ((0, [3, 4]), (1, [5]))]
        found.append(scorer.score(nodes, eos=True).tolist())
        scorer.keep(nodes[:1])
    assert found[0] == found[1]
    assert scorers[0].events == [EVENTS["Event"]([0, 1], [(3, 4), (5,)], True, ([0], [(3, 4)]))]


@pytest.mark.gpu
def test_ways_of_fused_layers_agree_and_their_products_are_told(capsys) -> None:
    pytest.importorskip("triton")
    from icefall_fusion.lm.fused import FusedModel

    bench, lm = runpy.run_path(str(BENCH / "llm_tree.py")), tiny(num_key_value_heads=1)
    lm.model.to("cuda" if torch.cuda.is_available() else "cpu")
    lm.device, lm.fused = lm.model.device, FusedModel(lm.model)
    events = [EVENTS["Event"]([0, 0, 1], [(5, 6), (5, 7, 8), (9,)], False, ([0], [(5, 6)])),
              EVENTS["Event"]([0, 1], [(5, 6, 9), (9, 4)], True)]
    found = {way: bench["replay"](way, lm, [(2, events)], lm.device.type)[1]
             for way, kind in bench["WAYS"].items() if issubclass(kind, bench["LazyTree"])}
    for scores in found.values():
        for one, other in zip(scores, found["lazy, unfused"]):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    lm.fused.products.told = [
        {"product": "down", "rows": 320, "form": form, "seconds": seconds}
        for form, seconds in ((None, 3e-6), ([64], 2e-6))
    ]
    table = bench["tell_products"]("tiny", lm, (1e12, 1e12))
    assert len(table) == 3 * 5 and all(row["predicted"] >= row["floor"] > 0 for row in table)
    assert "3.0 us cuBLAS     2.0 us least" in capsys.readouterr().out


@pytest.mark.parametrize("tied", [False, True])
def test_a_floor_reads_each_weight_once_and_the_table_of_embeddings_only_as_output_layer(tied) -> None:
    bench = runpy.run_path(str(BENCH / "llm_tree.py"))
    lm = tiny(tie_word_embeddings=tied)
    weights = 40 * 16 + 4 * 16 * 16 + 3 * 16 * 32 + 3 * 16
    row = {"forwards": 3, "tokens_forwarded": 50}
    assert bench["floor_seconds"](lm, row, 10.0, 1e9) == pytest.approx(4 * weights * 3 / 10.0)
    assert bench["floor_seconds"](lm, row, 1e9, 10.0) == pytest.approx(2 * weights * 50 / 10.0)


def test_events_of_a_file_are_measured_without_speech(tmp_path) -> None:
    events = [EVENTS["Event"]([0, 0, 1], [(5, 6), (5, 7, 8), (9,)], False, ([0], [(5, 6)])),
              EVENTS["Event"]([0, 1], [(5, 6, 9), (9, 4)], True)]
    EVENTS["write_events"](str(tmp_path / "events.json.gz"), EVENTS["Recording"]([(2, events)], 3.0, {}))
    options = ["--events", str(tmp_path / "events.json.gz"), "--output", str(tmp_path / "o.json")]
    program = (  # what needs speech is not there
        "import runpy, sys\n"
        "sys.modules['speech'] = None\n"
        f"sys.argv = {['llm_tree.py', *options]}\n"
        f"runpy.run_path({str(BENCH / 'llm_tree.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert [row["way"] for row in rows] == ["full texts", "path caches", "eager tree", "lazy tree"]
    assert all(row["events"] == 2 and row["largest_difference"] < 1e-4 for row in rows)
    assert all(row["times_floor"] == row["seconds"] / row["floor_seconds"] > 0 for row in rows)
