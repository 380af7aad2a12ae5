"""tools/bench/training.py: a row for each optimizer and batch, written when it is known.
Knows: the program and its file. Must not know: what a step does.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_rows_of_optimizers_and_batches(tmp_path: Path) -> None:
    recipe = "egs/minibooks/ASR/conf/tiny/ctc_aed_gpu.yaml"
    command = [sys.executable, "tools/bench/training.py", "--recipe", recipe,
               "--output", str(tmp_path / "rows.json"),
               "--batches", "[2,4]", "--optimizers", "[adamw,muon]", "--utterance", "2", "--steps", "2",
               "--warmup", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True)
    made = json.loads((tmp_path / "rows.json").read_text())
    rows = made["rows"]
    assert [(row["optimizer"], row["seconds_of_audio_a_step"]) for row in rows] == [
        ("adamw", 2.0), ("adamw", 4.0), ("muon", 2.0), ("muon", 4.0)]
    for row in rows:
        assert row["audio_hours_per_second"] >= 0 and 0 < row["share_of_matrix_rate"] < 1
        assert row["waits_a_step"] is None  # of a GPU alone
    assert 0 < rows[1]["calls_a_step"] < rows[3]["calls_a_step"]
    assert made["machine"] and made["options"]["batches"] == [2, 4]
