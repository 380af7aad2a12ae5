"""tools/chaos: a kill reaches every process of a tree, and a comparison finds whatever differs.
Knows: process_tree.py, compare.py, the files of jobs. Must not know: the recipe's stages.
"""
from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Callable

import pytest
import torch
from lhotse import CutSet
from safetensors.torch import save_file

from icefall_fusion.common.files import write_json, write_text
from icefall_fusion.data.manifests import cuts_path
from icefall_fusion.decode.run_files import RunFile
from icefall_fusion.nbest import Hypothesis, NBest
from icefall_fusion.train.checkpoints import save_checkpoint
from tests.decode.test_faults import corpus, cut, fbank

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "chaos"))

import compare
from kill_resume import KillResumeOptions
from process_tree import ProcessTree

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="there is no /proc here")
#: A shell, a child of its own session whose parent ends at once, and one that burns processor time.
TREE = "(setsid sleep 1000 &); (while :; do :; done) & sleep 1000"


def test_a_kill_reaches_every_process(tmp_path: Path) -> None:
    tree = ProcessTree(["bash", "-c", TREE], {"SAID": "x"}, tmp_path / "log")
    while len(tree.processes()) < 4:
        time.sleep(0.01)
    assert tree.wait_for_cpu(0.05) and tree.cpu_seconds() >= 0.05
    numbers = tree.processes()
    assert os.getpid() not in numbers and tree.kill() == len(numbers) >= 4
    assert tree.processes() == [] and tree.kill() == 0 and tree.wait() == -9
    ended = ProcessTree(["bash", "-c", 'echo "$SAID"; exit 3'], {"SAID": "hello"}, tmp_path / "log")
    assert ended.wait() == 3 and not ended.wait_for_cpu(1000)
    assert (tmp_path / "log").read_text() == "hello\n"


def test_differences_of_features_are_found(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    cuts = [cut(tmp_path / "audio", name) for name in ("a", "bb", "ccc")]
    for folder in (one, two):
        corpus(folder, cuts)
        assert fbank(folder, "--shard_size", "2") == 0
    assert compare.fbank(one, two) == []  # the names of archives are never the same
    assert compare.fbank_progress(two) == "2 shards, 1 sets joined"
    made = CutSet.from_jsonl_lazy(cuts_path(two / "fbank", "train"))
    archives = [Path(one.features.storage_path) for one in made]
    whole = archives[0].read_bytes()
    archives[0].write_bytes(archives[2].read_bytes()[:10] + whole[10:])
    shutil.copy(archives[2], archives[2].with_name("left-over.lca"))
    found = compare_or_error(lambda: compare.fbank(one, two))
    assert any("features" in line or "archive" in line for line in found), found
    archives[0].write_bytes(whole)
    assert compare.fbank(one, two) == [f"{archives[2].with_name('left-over.lca')} is in no manifest"]
    corpus(two, cuts[:2])
    assert fbank(two, "--shard_size", "2") == 0
    assert any("has 2 cuts instead of 3" in line for line in compare.fbank(one, two))


def compare_or_error(compare_: Callable[[], list[str]]) -> list[str]:
    """Return differences; what can no longer be read is one."""
    try:
        return compare_()
    except ValueError as error:
        return [str(error)]


def training_of(folder: Path, loss: float = 1.0, weight: float = 2.0, noise: float = 0.0) -> Path:
    exp = folder / "ctc_aed"
    state = {"model": {"w": torch.tensor([weight])}, "step": 4, "seconds": time.time(), "rng": (1, [noise])}
    save_checkpoint(state, exp / "checkpoint-4.pt", 1)
    times = {"minutes": time.time(), "data_wait": time.time()}
    lines = [{"step": step, **times, "valid_loss": loss * step} for step in (2, 4)]
    write_text(exp / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    (exp / "export").mkdir()
    save_file({"w": torch.tensor([weight])}, exp / "export" / "model.safetensors")
    return folder


def test_differences_of_trainings_are_found(tmp_path: Path) -> None:
    one = training_of(tmp_path / "one")
    assert compare.training(one, training_of(tmp_path / "same")) == []
    assert compare.training_progress(one) == "ctc_aed 4 steps"
    for name, change in (("loss", {"loss": 1.5}), ("weight", {"weight": 3.0}), ("noise", {"noise": 0.1})):
        assert compare.training(one, training_of(tmp_path / name, **change)), name
    two = training_of(tmp_path / "said-twice")
    log = two / "ctc_aed" / "log.jsonl"
    log.write_text(log.read_text() * 2)  # resumed, the same came again
    assert compare.training(one, two) == []
    log.write_text(log.read_text() + '{"step": 2, "valid_loss": 7.0}\n')
    assert "step 2 has valid_loss 2.0 and, resumed, 7.0" in compare.training(one, two)[0]
    (two / "ctc_aed" / "checkpoint-4.pt").unlink()
    assert any("newest checkpoint" in line for line in compare.training(one, two))


def decoding_of(
    folder: Path, text: str = "a b", score: float = -1.0, wer: float = 5.0, again: int = 1
) -> Path:
    out = folder / "decode"
    hypothesis = Hypothesis(tokens=[3], text=text, scores={"ctc": score, "words": 1.0, "total": score})
    file = RunFile(out, "dev", "m", {})
    for _ in range(again):
        file.append([NBest("u", [hypothesis], {"ctc": 1.0})], {"search": 1.0})
    file.close()
    write_text(out / "recogs-dev-m.txt", text)
    row = {"test_set": "dev", "method": "m", "wer": wer, "oracle_wer": 1, "words": 2}
    write_json(out / "results.json", [row])
    write_json(out / "run.json", {"status": "done", "skipped": []})
    write_text(folder / "weights.yaml", "weights: {}\n")
    return folder


def test_differences_of_decodings_are_found(tmp_path: Path) -> None:
    one = decoding_of(tmp_path / "one")
    assert compare.decoding(one, decoding_of(tmp_path / "same", score=-1.0 + 1e-5)) == []
    assert compare.decoding_progress(one) == "1 batches"
    for name, change in {
        "text": {"text": "a c"}, "score": {"score": -1.1}, "wer": {"wer": 5.1}, "twice": {"again": 2},
    }.items():
        assert compare.decoding(one, decoding_of(tmp_path / name, **change)), name
    two = decoding_of(tmp_path / "unfinished")
    write_json(two / "decode" / "run.json", {"status": "running", "skipped": [{"id": "u"}]})
    assert "status 'running', 1 skipped" in compare.decoding(one, two)[0]
    (two / "weights.yaml").unlink()
    assert any("weights.yaml is missing" in line for line in compare.decoding(one, two))


def test_wrong_options_are_refused() -> None:
    for wrong, message in (
        ({"stages": ("fbnk",)}, "stages must be one of .* did you mean 'fbank'"),
        ({"trials": 0}, "trials must be at least 1, but is 0"),
        ({"earliest": 1.0}, "earliest must lie in 0..1, but is 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(KillResumeOptions(), **wrong)
