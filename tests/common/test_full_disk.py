"""A disk that fills up while features, checkpoints and N-best lists are written: told, nothing lost.
Knows: jobs and their files, small real disks (tmpfs in a namespace). Must not know: how jobs work.
"""
from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
import torch
import yaml
from lhotse import CutSet, Recording

from icefall_fusion.data.manifests import cut_of, cuts_path, write_cuts
from icefall_fusion.nbest import read_nbests
from tests.train.test_acoustic_model import data_dir, options_for  # noqa: F401 # a fixture

ROOT = Path(__file__).resolve().parents[2]
#: disk, size, seed, what is kept, command: the command on a full disk, and once more when there is room.
SCRIPT = """
disk=$1 size=$2 seed=$3 kept=$4
shift 4
mount -t tmpfs -o "size=$size" tmpfs "$disk" || exit 77
cp -a "$seed/." "$disk"
"$@" >"$kept/first.log" 2>&1
echo $? >"$kept/first.code"
cp -a "$disk" "$kept/first"
mount -o remount,size=64m "$disk" || exit 77
"$@" >"$kept/second.log" 2>&1
echo $? >"$kept/second.code"
cp -a "$disk" "$kept/second"
"""


@dataclass(frozen=True)
class Run:
    """What a command left on a disk: its exit code, what it said, the files."""

    code: int
    said: str
    files: Path

    def names(self) -> set[str]:
        return {str(path.relative_to(self.files)) for path in self.files.rglob("*") if path.is_file()}


def on_a_small_disk(folder: Path, disk: Path, kilobytes: int, arguments: list[str]) -> tuple[Run, Run]:
    """Run a job twice on a disk that begins as a copy of itself: with so much room, then with enough."""
    kept, seed = folder / "kept", folder / "seed"
    kept.mkdir()
    disk.mkdir(exist_ok=True)
    disk.rename(seed)
    disk.mkdir()
    command = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", SCRIPT, "small-disk"]
    command += [str(disk), f"{kilobytes}k", str(seed), str(kept)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    job = [sys.executable, "-m", "icefall_fusion", *arguments]
    try:
        done = subprocess.run([*command, *job], env=environment, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare here: a disk of a few kilobytes cannot be made")
    if not (kept / "first.code").exists():
        pytest.skip(f"a disk of a few kilobytes cannot be mounted in a namespace here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return tuple(
        Run(int((kept / f"{name}.code").read_text()), (kept / f"{name}.log").read_text(), kept / name)
        for name in ("first", "second")
    )


def test_features(tmp_path: Path) -> None:
    disk, cuts = tmp_path / "data", []
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 48_000)
    for number in range(10):
        audio = tmp_path / f"{number}.flac"
        soundfile.write(audio, noise, 16_000)
        cuts.append(cut_of({"id": f"u{number}", "text": "x"}, audio, 48_000, {"voice": "none"}))
    assert Recording.from_file(audio).num_samples == 48_000
    write_cuts(cuts, cuts_path(disk / "manifests", "dev"))
    arguments = ["compute-fbank", "--data_dir", str(disk), "--splits", "dev", "--workers", "1"]
    full, again = on_a_small_disk(tmp_path, disk, 160, [*arguments, "--shard_size", "2"])
    assert full.code == 1, full.said
    assert f"error: No space left on device: {disk}/fbank/dev/" in full.said and "Traceback" not in full.said
    archives = {name for name in full.names() if name.endswith(".lca")}
    assert 0 < len(archives) < 5 and "fbank/minibooks_cuts_dev.jsonl.gz" not in full.names()
    assert not [name for name in full.names() if Path(name).name.startswith(".")]
    assert again.code == 0, again.said
    assert archives < {name for name in again.names() if name.endswith(".lca")}  # none is made twice
    manifest = cuts_path(again.files / "fbank", "dev")
    assert [cut.id for cut in CutSet.from_jsonl_lazy(manifest)] == [f"u{number}" for number in range(10)]


def test_checkpoints(data_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    def arguments(exp: Path) -> list[str]:
        options = options_for(data_dir, exp, save_every_steps=2)
        path = tmp_path / f"{exp.name}.yaml"
        path.write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(options)))))
        return ["train", "--config", str(path)]

    whole = subprocess.run(
        [sys.executable, "-m", "icefall_fusion", *arguments(tmp_path / "whole")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )
    assert whole.returncode == 0, whole.stderr
    size = (tmp_path / "whole" / "checkpoint-8.pt").stat().st_size
    exported = sum(path.stat().st_size + 4096 for path in (tmp_path / "whole" / "export").iterdir())
    room = int(2.5 * size + 1.5 * exported) // 1024  # for the checkpoints of steps 2 and 4
    full, again = on_a_small_disk(tmp_path, tmp_path / "exp", room, arguments(tmp_path / "exp"))
    assert full.code == 1, full.said
    assert "error: " in full.said and "exp/checkpoint-6.pt" in full.said and "Traceback" not in full.said
    kept = {"checkpoint-2.pt", "checkpoint-4.pt"}
    assert {name for name in full.names() if "checkpoint" in name} == kept
    for name in kept:
        assert torch.load(full.files / name, weights_only=True)["step"] == int(name[11])
    assert again.code == 0 and "resumed from" in again.said and "at step 4" in again.said
    models = [
        torch.load(folder / "checkpoint-8.pt", weights_only=True)["model"]
        for folder in (tmp_path / "whole", again.files)
    ]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_nbest_lists(tmp_path: Path) -> None:
    model, cuts = tiny.acoustic_model(tmp_path / "model"), tiny.manifest(tmp_path / "audio")

    def arguments(out: Path) -> list[str]:
        given = ["--emissions.model", str(model), "--test_sets.noise", str(cuts), "--methods", "ctc-prefix"]
        return ["decode", *given, "--batch_size=1", "--search.beam=20", "--out", str(out)]

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "icefall_fusion", *arguments(tmp_path / "whole")]
    whole = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    lists = tmp_path / "whole" / "nbest-noise-ctc-prefix.jsonl"
    room = lists.stat().st_size // 2048 + 16  # for half of the lists
    full, again = on_a_small_disk(tmp_path, tmp_path / "out", room, arguments(tmp_path / "out"))
    assert full.code == 1, full.said
    wanted = f"error: No space left on device: {tmp_path}/out/nbest-noise-ctc-prefix.jsonl"
    assert wanted in full.said and "Traceback" not in full.said
    assert again.code == 0, again.said
    first = (full.files / lists.name).read_bytes()
    second = again.files / lists.name
    assert 1 < first.count(b"\n") < 8 and second.read_bytes().startswith(first[: first.rfind(b"\n")])
    found = [{nbest.utterance: nbest for nbest in read_nbests(path)} for path in (lists, second)]
    assert found[0] == found[1]
    for name in ("recogs", "errs", "wer-summary"):
        path = f"{name}-noise-ctc-prefix.txt"
        assert (again.files / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()
