"""The table and the plot: rows checked, labels that do not cover one another, memory that can be reset.
Knows: icefall_fusion.scoring.table and plot. Must not know: models and searches.
"""
from __future__ import annotations

import json
import random
import re
import subprocess
import sys

import pytest

from icefall_fusion.__main__ import main
from icefall_fusion.scoring.plot import draw_panel, place_labels, plot
from icefall_fusion.scoring.table import read_rows, table

METHODS = [
    "ctc-greedy", "ctc-prefix", "attention-rescoring", "nlm-shallow", "llm-shallow", "llm-nbest-rescoring",
    "llm-delayed-shortest", "llm-delayed-interval-16", "llm-delayed-interval-32", "llm-delayed-interval-64",
    "nlm-shallow+llm-delayed-shortest", "nlm-shallow+llm-delayed-interval-16",
]


def rows(seed: int = 0, sets=("clean", "other")) -> list[dict]:
    rng = random.Random(seed)
    return [
        {
            "method": method, "test_set": test_set, "wer": 10 + rng.random() * 6, "words": 1500, "rtf": 0.02,
            "search_seconds": 10 ** rng.uniform(-1, 1.5), "lm_seconds": rng.random() * 10, "lm_forwards": 9,
            "lm_tokens_forwarded": 99999, "lm_tokens_scored": 100, "kv_bytes_peak": 10**6,
            "peak_memory_bytes": 10**9, "options": {}, "audio_seconds": 600.0,
        }
        for test_set in sets
        for method in METHODS
    ]


def test_table_has_every_row_and_marks_the_best() -> None:
    made = rows()
    text = table(made)
    assert text.count("clean: 1,500 words") == 1 and text.count("other: 1,500 words") == 1
    assert all(text.count(f"\n{method} ") == 2 for method in METHODS)
    assert text.count(" *") == 2 and table(made, markdown=True).count("**") == 4


def test_each_further_measure_has_a_column_of_its_own() -> None:
    assert "printed" not in table(rows())
    made = rows(sets=("clean",))
    made[3]["wer_printed"], made[4]["wer_libriheavy"] = 47.125, 11.25
    header, *lines = (table(made).splitlines()[i] for i in (2, 7, 8))
    assert "WER %  printed WER %  libriheavy WER %" in header
    assert lines[0].startswith(METHODS[3]) and re.search(r" 47.12 +- ", lines[0])
    assert lines[1].startswith(METHODS[4]) and re.search(r" - +11.25 ", lines[1])


def test_an_oracle_is_never_the_best() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made = rows(sets=("clean",))
    oracle = {**made[0], "method": "k2-nbest-oracle", "wer": 1.0}
    best = min(made, key=lambda row: row["wer"])["method"]
    marked = [line for line in table([*made, oracle]).splitlines() if " *" in line]
    assert len(marked) == 1 and marked[0].startswith(best)
    _, axes = plt.subplots(1, 2)
    for axis, shown in zip(axes, (made, [*made, oracle])):
        draw_panel(axis, shown, "clean")
    fronts = [axis.lines[0].get_xydata().tolist() for axis in axes]
    assert fronts[0] == fronts[1]


def test_a_row_without_a_key_is_refused() -> None:
    row = rows()[0]
    del row["rtf"]
    with pytest.raises(ValueError, match="'ctc-greedy' must have the keys.*rtf"):
        table([row])


@pytest.mark.parametrize("seed", range(3))
def test_labels_do_not_cover_each_other(seed) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made = rows(seed, ("clean",))
    for row in made[6:10]:  # a cluster, as delayed fusion's intervals make
        row.update(wer=12.0 + random.Random(row["method"]).random() * 0.1, search_seconds=5.0, lm_seconds=1.0)
    figure, axis = plt.subplots(figsize=(8.2, 6.4), dpi=110)
    draw_panel(axis, made, "clean")
    figure.tight_layout()
    place_labels(figure, axis)
    renderer = figure.canvas.get_renderer()
    boxes = [note.get_window_extent(renderer) for note in axis.texts]
    for i, one in enumerate(boxes):
        for other in boxes[:i]:
            width = min(one.x1, other.x1) - max(one.x0, other.x0)
            height = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert min(width, height) < 2.0  # pixels
    plt.close(figure)


def test_plot_and_report_job(tmp_path, capsys) -> None:
    made = rows()
    for name, part in (("a", made[:12]), ("b", made[12:])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(part))
    out = tmp_path / "out"
    assert main(["report", "--runs", f"[{tmp_path / 'a'},{tmp_path / 'b'}]", "--out", str(out)]) == 0
    assert "nlm-shallow+llm-delayed-shortest" in capsys.readouterr().out
    assert (out / "wer-vs-speed.png").read_bytes()[:4] == b"\x89PNG"
    assert read_rows([out]) == json.loads((out / "results.json").read_text()) == made
    assert main(["report", "--runs", f"[{tmp_path / 'nothing'}]"]) == 2
    plot(made[:1], tmp_path / "one.png")


def test_peak_memory_can_be_reset() -> None:
    """In a process of its own: a training keeps what it frees, and so does the process that ran one."""
    code = """
import numpy
from icefall_fusion.common.memory import peak_memory_bytes, reset_peak_memory
block = numpy.ones(300_000_000 // 8)
high = peak_memory_bytes()
assert high > block.nbytes, high
del block
reset_peak_memory()
assert peak_memory_bytes() < high - 200_000_000, (high, peak_memory_bytes())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
