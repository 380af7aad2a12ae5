"""Faulty utterances of a corpus are named with path and id, counted, and stop nothing else.
Knows: the jobs from manifests to training, their summaries. Must not know: how they work.
"""
from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import tiny
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

from icefall_fusion.__main__ import main
from icefall_fusion.data.manifests import SeenIds, cuts_path, write_cuts

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 4.0  # of each recording


def cut(folder: Path, name: str, start: float = 0.5, seconds: float = 2.0, text: str = "the cat") -> MonoCut:
    """Return a cut of a recording of its own, of noise."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.flac"
    soundfile.write(path, np.random.default_rng(len(name)).uniform(-0.3, 0.3, int(SECONDS * 16_000)), 16_000)
    spoken = SupervisionSegment(name, name, 0.0, seconds, text=text, speaker="noise", custom={"cased": text})
    recording = Recording.from_file(path, recording_id=name)
    return MonoCut(name, start, seconds, 0, recording=recording, supervisions=[spoken])


def corpus(folder: Path, cuts: list[MonoCut], split: str = "train") -> Path:
    """Write a manifest and return its path."""
    path = cuts_path(folder / "manifests", split)
    write_cuts(cuts, path)
    return path


def fbank(folder: Path, *more: str, split: str = "train") -> int:
    return main(["compute-fbank", "--data_dir", str(folder), "--splits", split, "--workers", "1", *more])


def audio_of(one: MonoCut) -> Path:
    return Path(one.recording.sources[0].source)


FAULTS = {
    "missing": (lambda path: path.unlink(), "no audio file at {}"),
    "empty": (lambda path: path.write_bytes(b""), "audio file {} is empty"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:9000]), "audio file {} "),
    "no-flac": (lambda path: path.write_text("<html>404</html>" * 99), "audio file {} cannot be read"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "no audio file at {}"),
}


def test_features_of_all_other_cuts_are_made_and_decoding_skips_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cuts = [cut(tmp_path / "audio", name) for name in ("first", *FAULTS, "beyond", "last")]
    cuts[-2] = cut(tmp_path / "audio", "beyond", start=3.0)  # ends one second after its recording
    for one in cuts[1:-2]:
        FAULTS[one.id][0](audio_of(one))
    manifest = corpus(tmp_path, cuts)
    assert fbank(tmp_path, "--shard_size", "3") == 3
    made = cuts_path(tmp_path / "fbank", "train")
    assert [one.id for one in CutSet.from_jsonl_lazy(made)] == ["first", "last"]
    report = json.loads((tmp_path / "fbank" / "compute-fbank-train.json").read_text())
    assert (report["utterances"], report["skipped_count"]) == (2, len(FAULTS) + 1)
    errors = {entry["id"]: entry["error"] for entry in report["skipped"]}
    for one in cuts[1:-2]:
        assert FAULTS[one.id][1].format(audio_of(one)) in errors[one.id]
        assert f"skipped {one.id}: {errors[one.id]}" in caplog.text
    assert errors["beyond"].startswith(f"audio file {audio_of(cuts[-2])} is truncated: ")

    model, out = tiny.acoustic_model(tmp_path / "model"), tmp_path / "out"
    command = ["--emissions.model", str(model), "--methods", "ctc-greedy", "--out", str(out)]
    assert main(["decode", *command, "--test_sets.noise", str(manifest)]) == 3  # straight from the audio
    skipped = json.loads((out / "run.json").read_text())["skipped"]
    assert {entry["id"] for entry in skipped} == {*FAULTS, "beyond"}
    for entry in skipped:
        assert entry["id"] in entry["error"] and str(tmp_path / "audio" / entry["id"]) in entry["error"]
    (row,) = json.loads((out / "results.json").read_text())
    assert row["words"] == 4  # of the two others


def test_broken_lines_and_files_of_manifests_are_refused_with_their_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe's own manifests are whole or not there: what is broken in them is no input to pass over."""
    cuts = [cut(tmp_path / "audio", f"u{number}") for number in range(3)]
    manifest = corpus(tmp_path, cuts)
    corpus(tmp_path, [cut(tmp_path / "audio", "of-dev")], "dev")
    export = ["export-transcripts", "--data_dir", str(tmp_path), "--corpus", "minibooks"]
    whole = gzip.decompress(manifest.read_bytes()).splitlines(keepends=True)
    manifest.write_bytes(gzip.compress(whole[0] + whole[1][:200] + b"\n" + whole[2]))
    assert fbank(tmp_path) == 2 and f"{manifest}, line 2 is no cut" in capsys.readouterr().err
    manifest.write_bytes(gzip.compress(b"".join(whole))[:-20])
    for job in (lambda: fbank(tmp_path), lambda: main(export)):
        assert job() == 2 and f"{manifest} is truncated or damaged after line" in capsys.readouterr().err
    model = tiny.acoustic_model(tmp_path / "model")
    command = ["--emissions.model", str(model), "--methods", "ctc-greedy", "--out", str(tmp_path / "out")]
    assert main(["decode", *command, "--test_sets.noise", str(manifest)]) == 2
    assert f"{manifest} cannot be loaded as a manifest of cuts" in capsys.readouterr().err
    assert not list((tmp_path / "text").glob("train*"))


@pytest.mark.parametrize("perturb", [False, True])
def test_an_id_that_comes_twice_is_refused_before_features_are_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], perturb: bool
) -> None:
    one = cut(tmp_path / "audio", "one")
    manifest = corpus(tmp_path, [one, cut(tmp_path / "audio", "two"), one])
    assert fbank(tmp_path, "--speed_perturb", str(perturb).lower()) == 2
    assert f"{manifest}, line 3 must have an id of its own" in capsys.readouterr().err
    assert not list(tmp_path.glob("fbank/**/*.lca"))


def test_seen_ids_are_those_that_were_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SeenIds, "_RECENT", 100)
    ids, seen = [f"u{number % 700}" for number in range(0, 7000, 3)], SeenIds()
    expected, right = set(), []
    for id in ids:
        right.append(seen.add(id) == (id not in expected))
        expected.add(id)
    assert all(right) and len(expected) == 700


def test_two_processes_at_the_same_shards_leave_one_of_each(tmp_path: Path) -> None:
    manifest = corpus(tmp_path, [cut(tmp_path / "audio", f"u{number}") for number in range(12)])
    arguments = ["compute-fbank", "--data_dir", str(tmp_path), "--splits", "train", "--workers", "1"]
    command = [sys.executable, "-m", "icefall_fusion", *arguments, "--shard_size", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        _, printed = process.communicate()
        assert process.returncode == 0, printed.decode()
    made = list(CutSet.from_jsonl_lazy(cuts_path(tmp_path / "fbank", "train")))
    assert [one.id for one in made] == [one.id for one in CutSet.from_jsonl_lazy(manifest)]
    for one in made:
        assert one.load_features().shape == (200, 80)


def test_training_goes_on_without_what_cannot_be_read_and_says_how_much(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Archives that are gone or cut short, and a text without words, which is one to learn silence from."""
    cuts = [cut(tmp_path / "audio", f"u{number}") for number in range(10)]
    cuts[3].supervisions[0].text = ""
    corpus(tmp_path, cuts)
    corpus(tmp_path, cuts[:2], "dev")
    assert fbank(tmp_path, "--shard_size", "1") == 0 and fbank(tmp_path, split="dev") == 0
    archives = {one.id: one.features.storage_path for one in
                CutSet.from_jsonl_lazy(cuts_path(tmp_path / "fbank", "train"))}
    Path(archives["u5"]).unlink()
    Path(archives["u6"]).write_bytes(Path(archives["u6"]).read_bytes()[:100])
    tiny.write_bpe(tmp_path / "lang_bpe_500")
    small = json.dumps({"size": 16, "heads": 2, "feedforward": 16, "layers": [1, 1, 0], "kernel": 5})
    trainer: dict[str, Any] = {"max_steps": 4, "save_every_minutes": 0, "valid_every_steps": 0}
    options = {
        "data_dir": tmp_path, "exp": tmp_path / "exp", "avg": 1, "device": "cpu", "stats_seconds": 100,
        "model.vocab_size": tiny.piece_count(), "model.encoder": small, "data.workers": 0,
        "model.decoder": json.dumps({"heads": 2, "feedforward": 16, "layers": 1}),
        "data.max_duration": 25, "data.num_buckets": 2, "data.time_warp": 0, "trainer": json.dumps(trainer),
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    assert main(["train", *words]) == 0
    summary = json.loads((tmp_path / "exp" / "skipped.json").read_text())
    errors = {entry["id"]: entry["error"] for entry in summary["skipped"]}
    assert set(errors) == {"u5", "u6"} and summary["utterances"] == 2
    assert all(archives[id] in error for id, error in errors.items())
    assert f"2 utterances could not be read, see {tmp_path}/exp/skipped.json" in capsys.readouterr().err
