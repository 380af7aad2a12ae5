"""Marks of stages: a finished stage runs again when its options, or those of a stage before it, are others.
Knows: egs/stages.sh, models.sh and the recipes' scripts. Must not know: models, audio.
"""
from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EGS = Path(__file__).resolve().parents[2] / "egs"
SCRIPT = """#!/usr/bin/env bash
# Two stages.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. {egs}/stages.sh
stop_stage=1
subset=small
pieces=500
while [ $# -gt 0 ]; do
  common_option "$@"
  if [ "$taken" -gt 0 ]; then shift "$taken"; continue; fi
  case "$1" in
    --subset) subset=$2 ;;
    --pieces) pieces=$2 ;;
  esac
  shift 2
done
set_folders
marks=$data_dir
depends subset "$subset"
if wanted 0 manifests; then
  if [ -n "$changed" ]; then set_aside "$data_dir/manifests"; fi
  echo "$subset" >"$data_dir/manifests"
  if [ "$subset" = killed ]; then exit 9; fi
  finish manifests
fi
depends pieces "$pieces"
if wanted 1 pieces; then
  echo "$(cat "$data_dir/manifests") $pieces" >>"$data_dir/pieces"
  finish pieces
fi
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "conf").mkdir()
    path = tmp_path / "two.sh"
    path.write_text(SCRIPT.replace("{egs}", str(EGS)))
    return path


def run(script: Path, *options: str, code: int = 0, **environment: str) -> str:
    done = subprocess.run(
        ["bash", str(script), *options], env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True, text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_stage_runs_again_with_other_options(script: Path) -> None:
    data, pieces = script.parent / "data", script.parent / "data" / "pieces"
    run(script)
    said = run(script)
    assert "stage 0 (manifests) is done" in said and "stage 1 (pieces) is done" in said
    assert pieces.read_text() == "small 500\n"
    said = run(script, "--pieces", "1000")
    assert "stage 0 (manifests) is done" in said
    assert "stage 1: pieces, again: it was made with pieces: 500" in said
    said = run(script, "--subset", "medium", "--pieces", "1000")  # what follows depends on it too
    assert "stage 0: manifests, again: it was made with subset: small" in said
    assert f"{data}/manifests was made with other options and is now {data}/manifests.1" in said
    assert pieces.read_text().splitlines() == ["small 500", "small 1000", "medium 1000"]
    assert (data / "manifests.1").read_text() == "small\n"
    assert (data / ".pieces.done").read_text() == "config: full\nsubset: medium\npieces: 1000\n"
    assert "is done" in run(script, "--subset", "medium", "--pieces", "1000")


def test_a_stage_that_was_stopped_goes_on_only_with_the_same_options(script: Path) -> None:
    data = script.parent / "data"
    run(script, "--subset", "killed", code=9)
    assert not (data / ".manifests.done").exists()
    run(script, "--subset", "killed", code=9)
    assert not (data / "manifests.1").exists()
    assert "again: it was made with subset: killed" in run(script, "--subset", "medium")
    assert (data / "manifests.1").read_text() == "killed\n"


def test_a_stage_that_is_left_out_tells_of_other_options(script: Path) -> None:
    pieces = script.parent / "data" / "pieces"
    run(script)
    said = run(script, "--subset", "medium", "--stage", "1")
    assert "stage 0 (manifests) is not run again, but was made with: subset: small" in said
    run(script, "--subset", "medium")  # the pieces of small are not those of medium
    assert pieces.read_text().splitlines() == ["small 500", "small 500", "medium 500"]
    marks = [script.parent / "data" / f".{name}.done" for name in ("manifests", "pieces")]
    for mark in marks:
        mark.write_text("")  # of earlier versions of the scripts
    assert "stage 0: manifests, again" in run(script, "--subset", "medium")


def test_one_folder_of_pieces_is_found_and_two_are_refused(tmp_path: Path) -> None:
    code = f'set -euo pipefail; . {EGS}/stages.sh; script=s; data_dir={tmp_path}; '
    code += 'found=$(pieces_folder); echo "[$found]"'

    def found() -> subprocess.CompletedProcess:
        return subprocess.run(["bash", "-c", code], capture_output=True, text=True)

    assert found().stdout == "[]\n"
    for name in ("lang_bpe_500", "lang_bpe_80.1"):  # that with a dot is set aside
        (tmp_path / name).mkdir()
    assert found().stdout == f"[{tmp_path}/lang_bpe_500]\n"
    (tmp_path / "lang_bpe_80").mkdir()
    two = found()
    assert two.returncode == 1 and not two.stdout
    assert f"{tmp_path}/lang_bpe_500 {tmp_path}/lang_bpe_80" in two.stderr


def write_download(folder: Path) -> None:
    """Write LibriHeavy's manifests of two cuts each, all with audio."""
    for name in ("small", "medium", "dev", "test_clean", "test_other"):
        part = name if name in ("small", "medium") else "large"
        audio = folder / "librilight" / part / "1" / "b" / f"{name}.flac"
        audio.parent.mkdir(parents=True, exist_ok=True)
        audio.touch()
        lines = []
        for number in range(2):
            recording = {"id": f"{part}/1/b/{name}", "sampling_rate": 16000, "num_samples": 320000}
            recording["sources"] = [{"source": f"download/librilight/{part}/1/b/{name}.flac"}]
            said = {"custom": {"texts": [f"The {name}.", ""]}}
            row = {"id": f"{recording['id']}_{number}", "start": 1.0, "duration": 5.0, "recording": recording}
            lines.append(json.dumps({**row, "supervisions": [said]}) + "\n")
        path = folder / "libriheavy" / f"libriheavy_cuts_{name}.jsonl.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress("".join(lines).encode()))


def test_libriheavy_prepares_another_subset_after_the_first(tmp_path: Path) -> None:
    write_download(tmp_path / "download")

    def prepare(*options: str, code: int = 0) -> str:
        places = ("--download", str(tmp_path / "download"), "--data-dir", str(tmp_path / "data"))
        stages = ("--config", "tiny", "--stage", "1", "--stop-stage", "1")
        return run(EGS / "libriheavy" / "ASR" / "prepare.sh", *stages, *places, *options, code=code)

    def train_cuts() -> int:
        path = tmp_path / "data" / "manifests" / "libriheavy_cuts_train.jsonl.gz"
        return len(gzip.decompress(path.read_bytes()).splitlines())

    prepare("--subset", "small")
    assert train_cuts() == 2
    assert "stage 1: manifests, again" in prepare("--subset", "medium") and train_cuts() == 4
    assert "stage 1 (manifests) is done" in prepare("--subset", "medium")
    (tmp_path / "download" / "librilight" / "large" / "1" / "b" / "dev.flac").unlink()
    (tmp_path / "data" / ".manifests.done").unlink()
    (tmp_path / "data" / "manifests" / "libriheavy_cuts_dev.json").unlink()
    said = prepare("--subset", "medium", code=2)
    assert "dev: 2 of 2 cuts (100.0 %) have no audio" in said and "--subset large" in said
    assert not (tmp_path / "data" / ".manifests.done").exists()
    assert "stage 1: manifests" in prepare("--subset", "medium", "--max-missing", "1", code=3)
