"""A decode by several processes leaves what one process leaves, after any kill, and never doubles anything.
Knows: the job decode. Must not know: how a search works.
"""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from icefall_fusion.__main__ import main
from icefall_fusion.acoustic.sources import CheckpointSource, EmissionOptions
from icefall_fusion.decode.job import DecodeOptions, DecodeRun
from icefall_fusion.decode.language_models import LmOptions
from icefall_fusion.decode.recognizer import Recognizer
from icefall_fusion.nbest import read_nbests

METHODS = "ctc-prefix,llm-delayed-shortest"
ROOT = Path(__file__).resolve().parents[2]


def arguments(made: dict[str, str], out: Path) -> list[str]:
    return [
        *("decode", "--emissions.model", made["model"], "--llm.path", made["llm"], "--out", str(out)),
        *("--test_sets.noise", made["cuts"], "--search.beam=4", "--methods", METHODS, "--batch_size=1"),
    ]


def two_processes(command: list[str]) -> subprocess.Popen:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "icefall_fusion"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *torchrun, *command], env=environment, start_new_session=True)


def wers(out: Path) -> list[tuple[str, float, int]]:
    rows = json.loads((out / "results.json").read_text())
    return [(row["method"], row["wer"], row["lm_tokens_scored"]) for row in rows]


def test_two_processes_leave_what_one_leaves_also_after_a_kill(made, tmp_path) -> None:
    assert main(arguments(made, tmp_path / "one")) == 0
    two = tmp_path / "two"
    process = two_processes(arguments(made, two))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if sum(path.read_text().count("\n") for path in two.glob("rank-*/nbest-*")) >= 7:  # 4 have options
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.002)
    process.wait()
    assert two_processes(arguments(made, two)).wait(timeout=120) == 0
    assert wers(two) == wers(tmp_path / "one")
    assert not list(two.glob("rank-*"))
    assert json.loads((two / "run.json").read_text())["processes"] == 2
    for method in METHODS.split(","):
        name = f"nbest-noise-{method}.jsonl"
        lists = [{n.utterance: n for n in read_nbests(out / name)} for out in (two, tmp_path / "one")]
        assert lists[0] == lists[1]
    before = (two / "results.json").stat().st_mtime_ns
    assert main(arguments(made, two)) == 0  # one process finds nothing left to do
    assert wers(two) == wers(tmp_path / "one") and (two / "results.json").stat().st_mtime_ns > before


def test_out_of_memory_halves_the_batch_and_changes_no_result(made, tmp_path, monkeypatch) -> None:
    def decode(out: str) -> DecodeRun:
        decode = DecodeRun(DecodeOptions(
            out=str(tmp_path / out), test_sets={"noise": made["cuts"]}, methods=METHODS,
            emissions=EmissionOptions(made["model"]), llm=LmOptions(made["llm"]), batch_size=5,
        ))
        decode.decode_all()
        return decode

    decode("enough")
    search, emit = Recognizer.search, CheckpointSource.emit

    def small_search(self, method, emissions, *context):
        if len(emissions.ids) > 1 and method.name != "ctc-prefix":
            raise torch.OutOfMemoryError("no room")
        return search(self, method, emissions, *context)

    def small_emit(self, ids, values):
        if len(ids) > 4:
            raise torch.OutOfMemoryError("no room")
        return emit(self, ids, values)

    monkeypatch.setattr(Recognizer, "search", small_search)
    monkeypatch.setattr(CheckpointSource, "emit", small_emit)
    recognizer = decode("little").recognizer
    assert json.loads((tmp_path / "little" / "run.json").read_text())["oom_backoffs"] == 2
    assert recognizer.oom_backoffs == 2 and wers(tmp_path / "little") == wers(tmp_path / "enough")

    def no_room(self, method, emissions, *context):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Recognizer, "search", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        decode("none")
